"""Score a merge beside everything it must beat: the target, shrinking alone, a random donor, plain interpolation.

Without the last three, shrinking the target's weights or averaging in noise can pass for transferred knowledge.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from mergekit_ot.checkpoint import CheckpointReader
from mergekit_ot.controls import random_donor
from mergekit_ot.pipeline import merge_recipe, plan_recipe
from mergekit_ot.planning import Pair
from mergekit_ot.recipe import Recipe, RecipeError
from mergekit_ot.settings import Calibration
from mergekit_ot.texts import read_texts


@dataclass
class Evaluation:
    """Losses of a merge and its controls, with the plans they came from.

    Args:
        losses (`dict[str, float]`): held-out nats per target token, by model.
        tokens (`int`): tokens scored.
        plans (`dict`): the bundle's JSON.
        tensors (`dict`): alpha, norm ratio and cosine of every merged tensor.
        recipe (`dict`): the recipe as run.
    """

    losses: dict[str, float]
    tokens: int
    plans: dict
    tensors: dict
    recipe: dict = field(default_factory=dict)

    def rows(self) -> list[dict]:
        """Losses as rows, in the order they were measured."""
        return [
            {"model": name, "loss": loss, "perplexity": math.exp(min(loss, 50.0))}
            for name, loss in self.losses.items()
        ]


@torch.no_grad()
def text_loss(
    model, tokenizer, texts: Sequence[str], *, max_tokens: int = 8192, max_length: int = 512
) -> tuple[float, int]:
    """Mean next-token loss over texts.

    Args:
        model (`PreTrainedModel`): causal language model in eval mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        texts (`Sequence[str]`): scored one by one, cut at `max_length` tokens.
        max_tokens (`int`, *optional*, defaults to 8192): predictions after which no further text is scored.

    Returns:
        Nats per token, and the number of tokens predicted.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"].to(device)
        if ids.shape[1] < 2:
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
        if count >= max_tokens:
            break
    if count == 0:
        raise ValueError("No text of at least two tokens to score.")
    return total / count, count


def held_out_texts(recipe: Recipe, texts: str | Path | None) -> list[str]:
    """Texts for scoring: those of a file, or the calibration texts after the first `samples` of the seeded order.

    Raises:
        [`RecipeError`]: when the calibration file holds none beyond those the plans may have seen.
    """
    if texts is not None:
        if not Path(texts).is_file():
            raise RecipeError(f"--texts: there is no file {texts}; give a .jsonl or a text file.")
        key = recipe.calibration.text_key if recipe.calibration else "text"
        return read_texts(Calibration(str(Path(texts).resolve()), text_key=key))
    if recipe.calibration is None:
        raise RecipeError("This recipe names no calibration text; give held-out texts with --texts.")
    everything = read_texts(recipe.calibration, recipe.folder)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(recipe.calibration.seed))
    rest = [everything[i] for i in order[recipe.calibration.samples :]]
    if not rest:
        raise RecipeError(
            f"All {len(everything)} calibration texts may be used for the plans (calibration.samples is "
            f"{recipe.calibration.samples}); give held-out texts with --texts, or lower calibration.samples."
        )
    return rest


def evaluate_recipe(
    recipe: Recipe,
    out: Path,
    *,
    plans: str | Path | None = None,
    texts: str | Path | None = None,
    max_tokens: int = 8192,
    device: str = "cpu",
    quiet: bool = False,
) -> Evaluation:
    """Score the merge in `out` and build and score every control.

    Args:
        recipe ([`Recipe`]): the recipe that made `out`.
        out (`Path`): merged checkpoint.
        plans, texts, max_tokens, device, quiet: see the command line.

    Returns:
        [`Evaluation`].
    """
    from mergekit.options import MergeOptions

    record = merge_record(recipe, out)
    lines = held_out_texts(recipe, texts)
    solved = plan_recipe(recipe, plans, device=device, quiet=quiet)
    pair = solved[0]
    options = MergeOptions(quiet=True, device=device)
    losses: dict[str, float] = {}
    tokens = 0
    bar = tqdm(total=4 + spelled_alike(pair) + same_shapes(pair), desc="scoring", disable=quiet)

    def score(name: str, folder: Path) -> None:
        nonlocal tokens
        bar.set_postfix_str(name)
        losses[name], tokens = _score(folder, pair.target_folder, lines, max_tokens, device)
        bar.update()

    score("target", pair.target_folder)
    score("merged", out)
    if spelled_alike(pair):
        score("donor", pair.donor_folder)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".controls-") as scratch:
        place = Path(scratch)
        score("shrink only", merge_recipe(recipe, place / "shrink", options, bundle_of=solved, control="shrink"))
        if same_shapes(pair):
            score(
                "plain interpolation",
                merge_recipe(recipe, place / "plain", options, bundle_of=solved, control="plain"),
            )
        if recipe.calibration is not None:
            donor = random_donor(pair.donor_folder, place / "donor", seed=recipe.calibration.seed)
            stranger = replace(recipe, donor=str(donor), plan="", gate="off")
            bar.set_postfix_str("plans of a random donor")
            score("random donor", merge_recipe(stranger, place / "random", options, plans=place / "plans"))
    bar.close()
    return Evaluation(losses, tokens, record["plans"], record["tensors"], record["recipe"])


def merge_record(recipe: Recipe, out: Path) -> dict:
    """What `run` left beside the weights in `out`.

    Raises:
        [`RecipeError`]: when there is no merge, or one at another alpha than the recipe's, with which controls at the
            recipe's alpha cannot be compared.
    """
    try:
        record = json.loads((out / "transport.json").read_text(encoding="utf-8"))
        parameters, _ = record["recipe"]["parameters"], (record["plans"], record["tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{out} holds no merge of this recipe (transport.json); `mergekit-ot run` makes it."
        ) from error
    for key in ("alpha", "gate", "min_confidence"):
        if parameters.get(key) != getattr(recipe, key):
            raise RecipeError(
                f"{out} was merged with {key} {parameters.get(key)!r}, the recipe has {getattr(recipe, key)!r}; run it again."
            )
    return record


def spelled_alike(pair: Pair) -> bool:
    """Whether both models read the same tokens, so that their losses per token can be compared."""
    files = [folder / "tokenizer.json" for folder in (pair.target_folder, pair.donor_folder)]
    if pair.target.vocab_size != pair.donor.vocab_size or not all(file.is_file() for file in files):
        return False
    first, second = (json.loads(file.read_text(encoding="utf-8")).get("model") for file in files)
    return first == second


def same_shapes(pair: Pair) -> bool:
    """Whether every target tensor has a donor tensor of the same name and shape."""
    return pair.target.summary() == pair.donor.summary() and set(CheckpointReader(pair.target_folder).names()) == set(
        CheckpointReader(pair.donor_folder).names()
    )


def _score(folder: Path, tokenizer_folder: Path, texts: list[str], max_tokens: int, device: str) -> tuple[float, int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return text_loss(model, AutoTokenizer.from_pretrained(tokenizer_folder), texts, max_tokens=max_tokens)
