"""The configurations that `accelerate launch` is given: read by accelerate itself, and what the pages say they are."""

import pytest


launch = pytest.importorskip("accelerate.commands.launch")
from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402

from tests.test_layering import ROOT  # noqa: E402


FOLDER = ROOT / "examples" / "accelerate"


def arguments(path):
    """What `accelerate launch --config_file PATH` makes of its command line."""
    parsed = launch.launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    return launch._validate_launch_command(parsed)[0]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))  # raises for keys that it does not know
    assert config.num_processes == 2
    found = arguments(path)
    assert (found.num_processes, found.num_machines, found.mixed_precision) == (2, 1, "bf16")
    assert f"accelerate launch --config_file examples/accelerate/{path.name}" in path.read_text().splitlines()[0]


def test_they_are_what_they_are_called():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"ddp", "fsdp2", "zero3"}
    ddp = arguments(FOLDER / "ddp.yaml")
    assert (ddp.multi_gpu, ddp.use_fsdp, ddp.use_deepspeed) == (True, False, False)
    sharded = arguments(FOLDER / "fsdp2.yaml")
    assert (sharded.use_fsdp, int(sharded.fsdp_version)) == (True, 2)
    assert sharded.fsdp_state_dict_type == "FULL_STATE_DICT"
    zero = arguments(FOLDER / "zero3.yaml")
    assert (zero.use_deepspeed, int(zero.zero_stage), str(zero.zero3_save_16bit_model).lower()) == (True, 3, "true")


def test_unknown_keys_are_seen(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text((FOLDER / "ddp.yaml").read_text() + "no_such_key: 1\n")
    with pytest.raises(ValueError, match="no_such_key"):
        load_config_from_file(str(broken))
