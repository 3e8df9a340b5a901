"""Finish the model card that mergekit writes: it cannot know the donor, which is a parameter to it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml


def licence_of(folder: Path) -> str:
    """Licence stated by a checkpoint's own card, else the title of its licence file, else `"not stated"`."""
    card = folder / "README.md"
    if card.is_file():
        front = _front_matter(card.read_text(encoding="utf-8", errors="replace"))
        if front.get("license"):
            name = front.get("license_name")
            return f"{front['license']} ({name})" if name else str(front["license"])
    for path in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")]):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        title = next((line.strip(" #*\t\r") for line in lines if line.strip(" #*\t\r")), "")
        if title:
            return f"{title} ({path.name})"
    return "not stated"


def _front_matter(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError:  # a card that somebody broke states nothing
        front = {}
    return front if isinstance(front, dict) else {}


def finish_card(
    card: Path, target: str, donor: str, folders: tuple[Path, Path], info: dict, recipe: str, alpha: object
) -> None:
    """Rewrite `README.md` with the donor, both licences and what the plans say of themselves.

    Args:
        card (`Path`): the card mergekit wrote; created when `--no-write-model-card` left none out is the caller's job.
        target, donor (`str`): models as the recipe names them.
        folders (`tuple[Path, Path]`): their local folders.
        info (`dict`): the bundle's JSON.
        recipe (`str`): the user's YAML.
        alpha (`object`): the alpha setting.
    """
    text = card.read_text(encoding="utf-8")
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    front = yaml.safe_load(match.group(1)) if match else {}
    hub = [name for name in (target, donor) if not Path(name).is_dir()]
    front["base_model"] = hub
    front["base_model_relation"] = "merge"
    front["tags"] = [*dict.fromkeys([*front.get("tags", []), "mergekit_ot"])]
    residual = info.get("residual", {})
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        f"# {card.parent.name}",
        "",
        "A transport merge, made with [mergekit](https://github.com/arcee-ai/mergekit) and mergekit_ot: the donor's",
        "weights were carried into the target's channels by optimal-transport plans and interpolated with the target's.",
        "",
        "| | model | licence stated by its files |",
        "|---|---|---|",
        f"| target (architecture, tokenizer) | {_link(target)} | {licence_of(folders[0])} |",
        f"| donor | {_link(donor)} | {licence_of(folders[1])} |",
        "",
        "Both licences apply to this model; check that they allow the use you make of it.",
        "",
        f"- alpha: `{json.dumps(alpha)}`",
        f"- stream map: {residual.get('map', 'per module')}",
        f"- layer map (donor layer of each target layer): `{json.dumps(info.get('layer_map'))}`",
        f"- plans: `{info.get('key', '')[:16]}`",
        "",
        "Whether this merge beats the target alone must be measured: `mergekit-ot eval` prints the loss beside the",
        "shrink-only and random-donor controls.",
        "",
        "```yaml",
        recipe.strip(),
        "```",
        "",
    ]
    card.write_text("\n".join(lines), encoding="utf-8")


def _link(name: str) -> str:
    return name if Path(name).is_dir() else f"[{name}](https://huggingface.co/{name})"
