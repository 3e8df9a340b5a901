"""Calibration rows with pictures, through a tiny model's own processor."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from optimum_freeact import FreeActConfig
from optimum_freeact.calibration.data import load_samples, read_data
from optimum_freeact.calibration.pictured import is_pictured
from optimum_freeact.cli import main
from tests.test_token_types_page import save_llava


Image = pytest.importorskip("PIL.Image", reason="pictures are made with Pillow, which is not installed")
SMALL = ["--preset", "rtn", "--n-samples", "4", "--seq-len", "32", "--quiet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with its processor, pictures, and rows about them in a folder below."""
    home = tmp_path_factory.mktemp("pictured")
    save_llava(home / "vlm")
    (home / "data").mkdir()
    rows = []
    for i in range(6):
        Image.new("L" if i == 5 else "RGB", (16 + i, 20), 40 * i).save(home / "data" / f"{i}.png")  # one is grey
        rows.append({"images": f"{i}.png", "text": f"<image>This is number {i}."})
    rows.append({"images": ["0.png", "1.png"], "text": "<image>and<image>"})
    rows.append({"text": "No picture at all."})
    (home / "data" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return home


@pytest.fixture(scope="module")
def processor(home):
    return transformers.AutoProcessor.from_pretrained(home / "vlm")


def written(folder, *rows) -> str:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "rows.jsonl")


def test_samples_are_what_the_processor_makes(home, processor):
    samples = load_samples(str(home / "data" / "rows.jsonl"), processor, 8, 999, seed=0)
    assert len(samples) == 8
    for i in range(5):
        image = Image.open(home / "data" / f"{i}.png")
        want = processor(images=[image], text=[f"<image>This is number {i}."], return_tensors="pt")
        assert set(samples[i]) == set(want)
        assert all(torch.equal(samples[i][name], want[name]) for name in want)
    assert samples[6]["pixel_values"].shape[0] == 2
    assert "pixel_values" not in samples[7]


def test_a_part_of_the_rows_is_chosen_and_only_that_is_opened(home, processor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    name = str(home / "data" / "0.png")
    rows = [{"images": name, "text": f"<image>{i}"} for i in range(9)]
    path = written(tmp_path, *rows, {"images": "broken.png", "text": "<image>9"})
    opened = []
    for seed in range(20):
        try:
            opened.append(len(load_samples(path, processor, 3, 999, seed)))
        except ValueError as error:
            opened.append(str(error))
    refused = [said for said in opened if said != 3]
    assert 0 < len(refused) < 20
    assert all("refuses the calibration row that begins '<image>9', with 1 pictures" in said for said in refused)


def test_chats_have_parts_for_pictures(home, processor, tmp_path):
    template = "{% for m in messages %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
    processor.chat_template = template
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    path = written(tmp_path, {"images": str(home / "data" / "0.png"), "messages": chat})
    [sample] = load_samples(path, processor, 1, 999, 0)
    want = processor(images=[Image.open(home / "data" / "0.png")], text=["<image>What is it?"], return_tensors="pt")
    assert torch.equal(sample["input_ids"], want["input_ids"])


def test_what_was_read_is_read_again(home, processor):
    data = read_data(str(home / "data" / "rows.jsonl"), 4, 999)
    assert is_pictured(data)
    assert not is_pictured(["a text"])
    assert read_data(data, 4, 999) == data
    first, second = (load_samples(given, processor, 4, 999, 1) for given in (data, str(home / "data" / "rows.jsonl")))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": "absent.png", "text": "<image>"}, "line 1: the picture '.*absent.png' is no file here"),
        ({"images": "a" * 5000, "text": "<image>"}, "is no file here"),
        ({"images": "a\0b", "text": "<image>"}, "is no file here"),
        ({"images": 3, "text": "<image>"}, "line 1: 'images' must be a file's name or a list of them, got 3"),
        ({"images": []}, "line 1, has neither a 'text' nor a 'messages' field"),
        ({"images": [], "text": 7}, "must be a string or a list"),
    ],
    ids=["absent", "long", "zero", "number", "nothing", "text"],
)
def test_rows_that_are_wrong_are_refused_before_anything_is_opened(row, message, processor, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_data(written(tmp_path, row), 1, 8)


def test_too_few_rows_and_a_tokenizer_alone(home, processor):
    path = str(home / "data" / "rows.jsonl")
    with pytest.raises(ValueError, match="n_samples=9 rows, got 8"):
        load_samples(path, processor, 9, 8, 0)
    with pytest.raises(ValueError, match="pass the model's processor"):
        load_samples(path, processor.tokenizer, 2, 8, 0)


def test_a_text_without_a_place_for_its_picture(home, processor, tmp_path):
    path = written(tmp_path, {"images": [str(home / "data" / "0.png")] * 2, "text": "<image>one place, two pictures"})
    with pytest.raises(ValueError, match="refuses the calibration row that begins '<image>one place"):
        load_samples(path, processor, 1, 8, 0)


@pytest.mark.filterwarnings("ignore")
def test_command_line_and_library_find_the_images_type(home, tmp_path, capsys):
    data, model = str(home / "data" / "rows.jsonl"), str(home / "vlm")
    assert (
        main(["quantize", model, str(tmp_path / "q"), "--dataset", data, *SMALL, "--preset", "freeact-fastest"]) == 0
    )
    saved = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert saved["token_types"] == ["text", "sink", "image"]
    assert "No calibration token is of type" not in capsys.readouterr().err
    config = FreeActConfig("freeact-fastest", dataset=data, n_samples=4, seq_len=32, progress=False)
    library = transformers.AutoModelForImageTextToText.from_pretrained(model, quantization_config=config)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "q")
    inputs = load_samples(data, transformers.AutoProcessor.from_pretrained(model), 1, 32, 0)[0]
    with torch.no_grad():
        assert torch.equal(library(**inputs).logits, again(**inputs).logits)


def test_a_model_without_a_processor_says_so(home, tmp_path, capsys):
    from tests.helpers.tiny_models import tiny, tiny_tokenizer

    tiny("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    words = [
        "quantize",
        str(tmp_path / "m"),
        str(tmp_path / "q"),
        "--dataset",
        str(home / "data" / "rows.jsonl"),
        *SMALL,
    ]
    assert main(words) == 2
    assert "have pictures" in capsys.readouterr().err
    assert not Path(tmp_path / "q").exists()
