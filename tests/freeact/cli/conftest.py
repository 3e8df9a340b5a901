"""A folder with models and texts, made once for all tests of the command line, which leave it as it is."""

import pytest

from optimum_freeact.cli import main
from tests.freeact.cli.words import OTHER, SMALL, TEXT, paths
from tests.helpers.tiny_models import plant_outliers, plant_sink, tiny, tiny_tokenizer


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a model, two texts and a quantized model."""
    home = tmp_path_factory.mktemp("cli")
    model = tiny("llama")
    plant_outliers(model)
    plant_sink(model)
    model.save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text(TEXT * 20)
    (home / "other.txt").write_text(OTHER * 20)
    assert main(["quantize", *paths(home, "model", "w4a4"), "--dataset", str(home / "text.txt"), *SMALL]) == 0
    return home
