"""Every form of calibration data becomes the same kind of windows."""

import json

import pytest
import torch

from optimum_freeact.calibration.data import load_samples, read_data
from tests.helpers.tiny_models import IM_START, VOCAB_SIZE, sample_ids, tiny_tokenizer


TEXT = "The quick brown fox jumps over the lazy dog. " * 20
CHAT = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day to you."}]


def windows(data, n=4, length=16, seed=0):
    return load_samples(data, tiny_tokenizer(), n, length, seed, VOCAB_SIZE)


def test_text_in_every_form_is_the_same(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": part}) for part in (TEXT[:300], TEXT[300:])) + "\n\n"
    )
    expected = windows([TEXT])
    for data in (tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path / "a.jsonl", [TEXT[:300], TEXT[300:]]):
        assert torch.equal(windows(data), expected)
    assert torch.equal(windows([{"text": TEXT}]), expected)
    assert expected.shape == (4, 16)
    assert expected.dtype == torch.int64
    text = tiny_tokenizer().decode(expected[0])
    assert text in TEXT


def test_chats_go_through_the_template(tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT}))
    expected = windows([CHAT, CHAT], n=4, length=24)
    assert int((expected == IM_START).sum()) == 4
    expected = windows([CHAT, CHAT], n=2)
    assert torch.equal(windows(tmp_path / "chats.jsonl", n=2), expected)
    assert torch.equal(windows([{"messages": CHAT}, {"messages": CHAT}], n=2), expected)
    assert torch.equal(windows(CHAT, n=2), windows([CHAT], n=2))  # one conversation


def test_ids_are_taken_as_they_are_and_cut():
    ids = sample_ids(4, 30)
    assert torch.equal(windows(ids), ids[:, :16])
    assert torch.equal(windows(ids.int()), ids[:, :16])


def test_a_list_of_tensors_is_one_tensor_of_them():
    ids = sample_ids(4, 30)
    assert torch.equal(windows(list(ids)), ids[:, :16])
    assert torch.equal(windows([ids[0], ids[1:3, :20], ids[3:].int()]), ids[:, :16])


NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", False),
    "c4": ("allenai/c4", "en", True),
    "somebody/texts": ("somebody/texts", None, False),
    "somebody/texts/french": ("somebody/texts", "french", False),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("column", ["text", "messages"])
def test_the_name_of_a_dataset(monkeypatch, name, column):
    """What `datasets` is asked for, and that a stream which does not know its columns will do."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, split, streaming):
        asked.append((path, config, streaming))
        assert split == "train"
        return iter([{"id": 0, column: TEXT if column == "text" else CHAT}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = windows([TEXT if column == "text" else CHAT] * 3)
    assert torch.equal(windows(name), expected)
    assert asked == [NAMES[name]]


def test_a_dataset_without_texts(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"label": 1}]))
    with pytest.raises(ValueError, match=r"dataset='somebody/labels' has columns \['label'\]; 'text' or 'messages'"):
        windows("somebody/labels")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([]))
    with pytest.raises(ValueError, match="64 tokens; the data is empty"):
        windows("somebody/nothing")


@pytest.mark.parametrize("name", ["../../texts", "/data/texts", "a/b/c/d", "~/texts", "here/inside/more"])
def test_a_path_is_never_searched_as_a_dataset(name, tmp_path, monkeypatch):
    """`datasets` would take a folder, and everything below it, for one."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(ValueError, match="is no file here, and cannot be a dataset's name"):
        windows(name)


def test_the_seed_chooses_and_order_is_kept():
    first, again, other = windows([TEXT], seed=0), windows([TEXT], seed=0), windows([TEXT], seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ids = torch.arange(40)[:, None].expand(40, 16)
    chosen = load_samples(ids, None, 5, 16, 3)[:, 0]
    assert len(set(chosen.tolist())) == 5
    assert torch.equal(chosen, chosen.sort().values)


def test_reading_twice_is_reading_once(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    once = read_data(tmp_path / "a.txt", 4, 16)
    assert read_data(once, 4, 16) == once
    assert torch.equal(windows(once), windows(tmp_path / "a.txt"))


def test_an_iterable_is_read():
    assert torch.equal(windows(part for part in [TEXT]), windows([TEXT]))


@pytest.mark.parametrize("item", [3, None, {"title": "x"}, ["a", "b"], [{"role": "user"}], b"bytes", []])
def test_other_items_are_refused(item):
    with pytest.raises(ValueError, match="must be a string or a list of .*'role', 'content'"):
        windows([TEXT, item])
