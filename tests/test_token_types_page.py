"""The how-to page about models with token types, run as it is on tiny models."""

import json
from pathlib import Path

import pytest
import transformers

from tests.helpers.tiny_diffusion import make
from tests.helpers.tiny_models import VOCAB_SIZE, randomize_, tiny_tokenizer
from tests.test_documentation import ROOT, run_page


TEXT = {
    "vocab_size": VOCAB_SIZE + 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def save_llada(folder):
    make("llada", max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def save_llava(folder):
    """With a processor that puts an image's places where its text says <image>."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=sight, image_token_index=image
    )
    model = transformers.LlavaForConditionalGeneration(config)
    randomize_(model)
    model.save_pretrained(folder)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_commands_keep_a_models_processor(tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image", reason="pictures are made with Pillow, which is not installed")
    from optimum_freeact.cli import main

    monkeypatch.chdir(tmp_path)
    save_llava("vlm")
    Path("texts.txt").write_text("Optimal transport moves masses from one place to another, and no further.\n" * 40)
    small = ["--preset", "rtn", "--n-samples", "4", "--seq-len", "32", "--quiet"]
    eight = ["--weight-bits", "8", "--activation-bits", "8"]
    assert main(["quantize", "vlm", "quantized", "--dataset", "texts.txt", *small, *eight]) == 0
    assert main(["export", "quantized", "exported"]) == 0
    before = transformers.AutoProcessor.from_pretrained("vlm")
    for folder in ("quantized", "exported"):
        after = transformers.AutoProcessor.from_pretrained(folder)
        assert after.to_dict() == before.to_dict()
        assert type(after) is type(before)


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image", reason="the page opens pictures with Pillow, which is not installed")

    monkeypatch.chdir(tmp_path)
    save_llada("path/to/llada")
    save_llava("path/to/vlm")
    for name in ("texts.txt", "held-out.txt"):
        Path(name).write_text("Optimal transport moves masses from one place to another, and no further.\n" * 400)
    rows = []
    for name, colour in (("owl.png", "brown"), ("tram.png", "red"), ("pear.png", "green")):
        image.new("RGB", (24, 16), colour).save(name)
        rows += [json.dumps({"images": name, "text": f"<image>This is one, in {colour}."})] * 12
    Path("pictures.jsonl").write_text("\n".join(rows))
    done = run_page(ROOT / "docs" / "how-to" / "token-types.md", tmp_path, {})
    assert done == ["freeact quantize", "freeact inspect", "freeact evaluate", "freeact quantize"]
    printed = capsys.readouterr().out
    assert "Optimal transport moves" in printed
    assert "['text', 'sink', 'image']" in printed
    processor = transformers.AutoProcessor.from_pretrained("vlm-w4a4")
    model = transformers.AutoModelForImageTextToText.from_pretrained("vlm-w4a4")
    inputs = processor(images=image.open("owl.png"), text="<image>An", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
