"""From a recipe to a merged checkpoint: check, plan, run mergekit, finish the card, and only then show the folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_ot.alpha import unmatched_filters
from mergekit_ot.bundle import PlanBundle, load_bundle
from mergekit_ot.card import finish_card
from mergekit_ot.checkpoint import CheckpointReader
from mergekit_ot.compatibility import Finding, compare
from mergekit_ot.disk import require_space
from mergekit_ot.folders import refuse_foreign, replace_folder, scratch_beside
from mergekit_ot.planning import Pair, make_bundle, match_pair, open_pair, plan_key
from mergekit_ot.recipe import Recipe, RecipeError
from mergekit_ot.structure import layer_tensor


if TYPE_CHECKING:
    from mergekit.options import MergeOptions


def check_recipe(recipe: Recipe) -> tuple[Pair, list[Finding]]:
    """Open both models and compare them; also matches the calibration text, so that a short one is found now."""
    pair = open_pair(recipe.target, recipe.donor)
    check_filters(recipe, pair)
    findings = compare(pair, recipe.settings, recipe.alpha)
    if recipe.calibration is not None:
        texts = match_pair(pair, recipe.calibration, recipe.folder)
        found = sum(len(text.target_rows) for text in texts)
        tokens = sum(len(text.target_ids) for text in texts)
        findings[-1] = Finding(
            "matched rows", f"{tokens} tokens", f"{sum(len(t.donor_ids) for t in texts)} tokens", f"{found} rows found"
        )
    return pair, findings


def plan_recipe(
    recipe: Recipe, plans: str | Path | None = None, *, device: str = "cpu", quiet: bool = False
) -> tuple[Pair, PlanBundle, Path]:
    """Solve the plans of a recipe, or load those it names.

    Args:
        plans (`str | Path`, *optional*): bundle folder; by default `.mergekit_ot/<key>` beside the recipe.

    Returns:
        The pair, the bundle and its folder.
    """
    check_place(plans, device)
    pair = open_pair(recipe.target, recipe.donor)
    check_filters(recipe, pair)
    if recipe.plan:
        return pair, load_bundle(recipe.plan), Path(recipe.plan)
    if recipe.calibration is None:
        raise ValueError("Solving plans needs text: give the recipe calibration.dataset, or parameters.plan.")
    if plans is None:
        key = plan_key(pair, recipe.calibration, recipe.settings, recipe.folder)
        plans = recipe.folder / ".mergekit_ot" / key[:16]
    require_space(Path(plans), 64 << 20, "the plan bundle")
    bundle = make_bundle(
        pair, recipe.calibration, recipe.settings, plans, folder=recipe.folder, device=device, quiet=quiet
    )
    return pair, bundle, Path(plans)


def check_filters(recipe: Recipe, pair: Pair) -> None:
    """Refuse a filter of alpha that fits no tensor of the target: mergekit would pass over it in silence."""
    names = CheckpointReader(pair.target_folder).names()
    if unknown := unmatched_filters(recipe.alpha, names):
        raise RecipeError(
            f"parameters.alpha: no tensor of the target has {unknown[0]!r} in its name; names look like "
            f"{layer_tensor(0, 'mlp.up_proj.weight')!r} and {layer_tensor(0, 'self_attn.q_proj.weight')!r}."
        )


def check_place(plans: str | Path | None, device: str) -> None:
    """Refuse a bundle folder without a name and a device that is not here, before anything is read or written."""
    if plans is not None and (not Path(plans).name or ".." in Path(plans).parts[-1:] or Path(plans).is_file()):
        raise ValueError(f"The plans need a folder of their own, got {str(plans)!r}; name one, such as 'plans'.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from None


def keep_inputs(recipe: Recipe, out: Path, plans: str | Path | None) -> None:
    """Refuse an output folder in which something lies that the merge reads: replacing it would remove that."""
    read = [Path(place) for place in (recipe.target, recipe.donor, plans, recipe.plan) if place]
    read += [recipe.folder / recipe.calibration.dataset] if recipe.calibration else []
    for path in read:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise RecipeError(f"{out} cannot be the output: {path}, which is read, lies there; choose another folder.")


def merge_recipe(
    recipe: Recipe,
    out: str | Path,
    options: MergeOptions,
    *,
    plans: str | Path | None = None,
    bundle_of: tuple[Pair, PlanBundle, Path] | None = None,
    **changes: object,
) -> Path:
    """Run a recipe.

    Args:
        recipe ([`Recipe`]): what to merge.
        out (`str | Path`): output folder; it appears whole or not at all. An earlier merge there is replaced, any other
            content is refused.
        options (`MergeOptions`): mergekit's options.
        plans (`str | Path`, *optional*): bundle folder, see `plan_recipe`.
        bundle_of (`tuple`, *optional*): result of `plan_recipe`, when it was called before.
        changes: parameters that replace the recipe's, e.g. `alpha=0.2` or `control="shrink"`.

    Returns:
        `Path` of the output folder.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge

    from mergekit_ot.registration import register

    out = Path(out)
    refuse_foreign(out, "transport.json", "an earlier transport merge")
    keep_inputs(recipe, out, plans)
    pair, bundle, folder = bundle_of or plan_recipe(recipe, plans, device=options.device or "cpu", quiet=options.quiet)
    weights = sum(path.stat().st_size for path in pair.target_folder.glob("*.safetensors"))
    require_space(out, 2 * weights, "the merged weights")
    stock = recipe.to_mergekit(folder.resolve(), **{"control": recipe.control} | changes)
    config = MergeConfiguration.model_validate(copy.deepcopy(stock))
    method = register()
    method.release()
    LoaderCache().setup(options)
    method.prepare(config.base_model, stock["parameters"])
    out.parent.mkdir(parents=True, exist_ok=True)
    place = scratch_beside(out)
    scratch = place / out.name  # the card takes its title from the folder's name
    try:
        run_merge(config, str(scratch), options=options, config_source=recipe.source or json.dumps(stock, indent=1))
        if (scratch / "README.md").is_file():
            source = (recipe.target, recipe.donor, (pair.target_folder, pair.donor_folder))
            alpha = stock["parameters"]["alpha"]
            finish_card(
                scratch / "README.md", *source, bundle.info, recipe.source or json.dumps(stock, indent=1), alpha
            )
        record = {"recipe": stock, "plans": bundle.info, "tensors": dict(method.records)}
        (scratch / "transport.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        replace_folder(scratch, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        method.release()
        LoaderCache.loaders.clear()
    return out
