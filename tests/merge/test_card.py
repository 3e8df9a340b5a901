"""The licences on a merge's card: from a model's own card, else from its licence file."""

import huggingface_hub
import pytest

from mergekit_ot import planning
from mergekit_ot.card import licence_of


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "not stated"),
        ({"README.md": "---\nlicense: mit\n---\n# A model\n"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: gemma\n---\n"}, "other (gemma)"),
        (
            {"README.md": "# no front matter\n", "LICENSE": "\n  Apache License\n  Version 2.0\n"},
            "Apache License (LICENSE)",
        ),
        ({"README.md": "---\nlicense: [\n---\n", "LICENSE.md": "# MIT License\n"}, "MIT License (LICENSE.md)"),
        ({"README.md": "---\n- a list\n---\n"}, "not stated"),
        ({"LICENSE": "\n\n"}, "not stated"),
    ],
)
def test_licence_of_a_folder(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == expected


def test_what_states_a_licence_is_taken_from_the_hub_too(tmp_path, monkeypatch):
    """Without it the card of every hub model would say that none is stated."""
    asked = {}

    def snapshot_download(model, allow_patterns):
        asked[model] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert planning.local_folder("some/model-that-is-no-folder") == tmp_path
    assert {"README.md", "LICENSE*"} <= set(asked["some/model-that-is-no-folder"])
