"""The texts of the benchmarks: four lists, each from files of its own, the same every time."""

import json

from benchmarks.merge import texts
from tools import assets


def test_a_library_is_split_by_file(tmp_path, monkeypatch):
    files = [{"path": f"{i}.rs", "text": f"file {i:04d} " * 400} for i in range(300)]
    files.append({"path": "short.rs", "text": "too short"})
    (tmp_path / "files.jsonl").write_text("".join(json.dumps(file) + "\n" for file in files))
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path)
    chunks = texts.library_chunks("rust-std")
    assert chunks == texts.library_chunks("rust-std")
    assert chunks["train"] != texts.library_chunks("rust-std", seed=1)["train"]
    named = {name: {piece.split("file ")[-1][:4] for piece in pieces} for name, pieces in chunks.items()}
    assert set(named) == {"calibration", "train", "valid", "eval"}
    assert len(set.union(*named.values())) == sum(map(len, named.values())) >= 299
    assert {len(piece) for pieces in chunks.values() for piece in pieces} == {texts.CHUNK}
