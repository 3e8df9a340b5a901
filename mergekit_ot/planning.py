"""From two checkpoints and a text to a plan bundle on disk, resumable at every step."""

from __future__ import annotations

import gc
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mergekit_ot.activations import load_backbone, record
from mergekit_ot.anchors import MatchedText, match_texts, require_fast, require_tokenizer_files
from mergekit_ot.bundle import BundleError, PlanBundle, load_bundle, refuse_other_plans
from mergekit_ot.checkpoint import CheckpointReader, check_tensors
from mergekit_ot.digest import content_key, file_hash, model_hash
from mergekit_ot.disk import require_space
from mergekit_ot.layer_map import parse_map
from mergekit_ot.paper import solve_paper
from mergekit_ot.rows import RowStore
from mergekit_ot.settings import Calibration, PlanSettings
from mergekit_ot.solve import rows_needed, solve_pair
from mergekit_ot.structure import Structure, UnsupportedModelError, load_structure
from mergekit_ot.texts import read_texts
from mergekit_ot.vocabulary import shared_tokens


logger = logging.getLogger(__name__)
DEFAULT_ROWS = 4096
#: Stores below this many bytes are kept in float32, larger ones in float16 (block sites only).
FLOAT32_LIMIT = 256 << 20
#: Parameters from which a model is swept from memory at once; the sweep itself takes half a second.
COLLECT_LIMIT = 10_000_000

#: What is taken from the hub: the model, its tokenizer, and what states its licence.
SNAPSHOT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "LICENCE*")


@dataclass(frozen=True)
class Pair:
    """Two local checkpoints and what is known of them before any long work.

    Args:
        target_folder, donor_folder (`Path`): checkpoints.
        target, donor ([`Structure`]): their shapes.
    """

    target_folder: Path
    donor_folder: Path
    target: Structure
    donor: Structure


def local_folder(model: str) -> Path:
    """Folder of a checkpoint: the path itself, or its snapshot from the hub.

    Raises:
        `FileNotFoundError`: when there is neither.
        [`UnsupportedModelError`]: for an adapter without its model.
    """
    folder = Path(model) if Path(model).is_dir() else _snapshot(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"{model} is an adapter (LoRA), not a model; merge it into its model first.")
    return folder


def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(SNAPSHOT)))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{model!r} is neither a folder nor a model that the hub gives: {reason}") from error


def open_pair(target: str, donor: str) -> Pair:
    """Resolve both models, read their shapes and compare them with what their files hold."""
    folders = local_folder(target), local_folder(donor)
    if folders[0].resolve() == folders[1].resolve():
        raise ValueError(f"Target and donor are the same checkpoint, {folders[0]}; name a donor other than the base.")
    pair = Pair(*folders, load_structure(folders[0]), load_structure(folders[1]))
    check_tensors(pair.target_folder, pair.target)
    check_tensors(pair.donor_folder, pair.donor)
    return pair


def plan_key(pair: Pair, calibration: Calibration, settings: PlanSettings, folder: str | Path = ".") -> str:
    """Hash of everything the plans depend on: both checkpoints' content, the text, and all choices."""
    return content_key(
        {
            "target": model_hash(pair.target_folder),
            "donor": model_hash(pair.donor_folder),
            "text": file_hash(Path(folder) / calibration.dataset),
            "calibration": {k: v for k, v in asdict(calibration).items() if k != "dataset"},
            "settings": settings.to_dict(),
        }
    )


def match_pair(pair: Pair, calibration: Calibration, folder: str | Path = ".") -> list[MatchedText]:
    """Texts and matched positions of a pair."""
    from transformers import AutoTokenizer

    folders = pair.target_folder, pair.donor_folder
    for folder_ in folders:
        require_tokenizer_files(folder_)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in folders]
    for tokenizer, path in zip(tokenizers, folders):
        require_fast(tokenizer, str(path))
    texts = read_texts(calibration, folder)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(calibration.seed))
    texts = [texts[i] for i in order[: calibration.samples]]
    needed = rows_needed(pair.target, pair.donor)
    return match_texts(
        texts,
        *tokenizers,
        rows=calibration.rows or max(DEFAULT_ROWS, 2 * needed),
        rows_needed=needed,
        max_length=calibration.max_length,
        seed=calibration.seed,
    )


def make_bundle(
    pair: Pair,
    calibration: Calibration,
    settings: PlanSettings,
    out: str | Path,
    *,
    folder: str | Path = ".",
    work: str | Path | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> PlanBundle:
    """Solve the plans of a pair, or return those that `out` already holds for exactly this content.

    Args:
        pair ([`Pair`]): both models.
        calibration ([`Calibration`]), settings ([`PlanSettings`]): what to solve.
        out (`str | Path`): bundle folder.
        folder (`str | Path`, *optional*): where a relative `calibration.dataset` starts.
        work (`str | Path`, *optional*): folder for activation rows, defaults to `out` + `.rows`; it survives an
            interruption, so that the next call resumes, and is removed after success.
        device (`str`, *optional*, defaults to `"cpu"`): where models run and plans are solved.

    Returns:
        The [`PlanBundle`], saved at `out`.

    Raises:
        `FileExistsError`: before anything is run, when `out` holds anything but plans.
    """
    out = Path(out)
    key = plan_key(pair, calibration, settings, folder)
    try:
        found = load_bundle(out)
        if found.info.get("key") == key:
            logger.info("Reusing the plans in %s.", out)
            return found
    except BundleError:
        pass
    refuse_other_plans(out)
    if settings.layer_map != "monotone":
        parse_map(settings.layer_map, pair.target.n_layers, pair.donor.n_layers)  # refused before anything is run
    texts = match_pair(pair, calibration, folder)
    work = Path(work) if work is not None else out.with_name(out.name + ".rows")
    stores = record_pair(pair, texts, work, key, device=device, quiet=quiet)
    if settings.preset == "structured":
        readers = CheckpointReader(pair.target_folder), CheckpointReader(pair.donor_folder)
        bundle = solve_pair(*stores, pair.target, pair.donor, settings, *readers, device=device, quiet=quiet)
        if settings.embeddings == "shared":
            bundle.tensors["tokens.target"], bundle.tensors["tokens.donor"] = (ids.int() for ids in _shared(pair))
    else:
        counts = [len(text.target_rows) for text in texts]
        reader = CheckpointReader(pair.donor_folder)
        bundle = solve_paper(*stores, pair.target, pair.donor, settings, counts, reader, device=device, quiet=quiet)
    bundle.info["key"] = key
    bundle.info["calibration"] = asdict(calibration)
    bundle.info["models"] = {"target": pair.target.name, "donor": pair.donor.name}
    bundle.save(out)
    shutil.rmtree(work, ignore_errors=True)
    return bundle


def _shared(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoTokenizer

    return shared_tokens(*(AutoTokenizer.from_pretrained(path) for path in (pair.target_folder, pair.donor_folder)))


def record_pair(
    pair: Pair, texts: list[MatchedText], work: Path, key: str, *, device: str = "cpu", quiet: bool = False
) -> tuple[RowStore, RowStore]:
    """Record matched rows of both models, one model in memory at a time.

    Raises:
        `OSError`: before anything is run, when the disk cannot hold the rows of both.
    """
    rows = sum(len(text.target_rows) for text in texts)
    sides = {"target": (pair.target_folder, pair.target), "donor": (pair.donor_folder, pair.donor)}
    kinds = {side: _row_kind(shape, rows) for side, (_, shape) in sides.items()}
    needed = sum(rows * row_bytes(shape, kinds[side]) for side, (_, shape) in sides.items())
    there = sum(path.stat().st_size for path in work.glob("*/*"))  # resumed, or replaced
    require_space(work, needed - there, f"activations at {rows} matched rows; calibration.rows sets how many")
    stores = {side: RowStore(work / side, key, kind) for side, kind in kinds.items()}
    for side, (path, shape) in sides.items():
        store = stores[side]
        if store.rows < rows:
            inputs = [(getattr(text, f"{side}_ids"), getattr(text, f"{side}_rows")) for text in texts]
            model = load_backbone(path, device)
            record(model, shape, inputs, store, quiet=quiet)
            large = sum(parameter.numel() for parameter in model.parameters()) >= COLLECT_LIMIT
            del model
            if large:
                gc.collect()
    return stores["target"], stores["donor"]


def _block_channels(shape: Structure) -> int:
    """Channels of all block sites of a model."""
    return shape.n_layers * (shape.mlp_width + 2 * shape.head_dim * (shape.n_heads + shape.n_kv_heads))


def _row_kind(shape: Structure, rows: int) -> str:
    return "float32" if 4 * rows * _block_channels(shape) <= FLOAT32_LIMIT else "float16"


def row_bytes(shape: Structure, kind: str) -> int:
    """Bytes that one matched row takes on disk: block sites in `kind`, the stream at every depth in float32, a token."""
    return {"float32": 4, "float16": 2}[kind] * _block_channels(shape) + 4 * (2 * shape.n_layers + 1) * shape.width + 8
