"""A tiny model, plain and quantized, as folders and in memory."""

import pytest

from tests.helpers.quantized import logits, reload, settings
from tests.helpers.tiny_models import tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(plain_folder):
    return reload(plain_folder, quantization_config=settings())


@pytest.fixture(scope="module")
def expected(model):
    return logits(model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
