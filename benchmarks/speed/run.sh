#!/usr/bin/env bash
# The GPU benchmark on the one or two GPUs of this machine, each with a lane of its own; every row is written as it comes.
#
#   bash benchmarks/speed/run.sh OUT [SECONDS]      then, where git is: python -m benchmarks.speed.collect OUT
#
# A step that fails or takes too long is left out and the next one goes on.
set -u
out="$1" seconds="${2:-230}" begin=$SECONDS
mkdir -p "$out"
export PYTHONPATH=. PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
gpus="$(nvidia-smi -L | wc -l)"

step() { # step GPU LIMIT LOG MODULE ARGUMENTS...
    local gpu="$1" limit="$2" log="$3" left=$((seconds - (SECONDS - begin)))
    shift 3
    ((left < 8)) && return
    CUDA_VISIBLE_DEVICES="$gpu" timeout $((left < limit ? left : limit)) python -m "$@" --out "$out" >>"$out/$log.log" 2>&1 ||
        echo "step failed or ran out of time: $*" >>"$out/failed.log"
}

first() {
    step 0 80 linear benchmarks.speed.linear --seconds 66
    step 0 70 calibrate benchmarks.speed.calibrate --layers 2
}
second() {
    local gpu=$((gpus - 1))
    step $gpu 45 model benchmarks.speed.model --provider bf16 --run graph
    step $gpu 60 model benchmarks.speed.model --provider freeact --run graph
    step $gpu 120 model benchmarks.speed.model --provider freeact --run compile
    step $gpu 120 model benchmarks.speed.model --provider bf16 --run compile
}
if ((gpus > 1)); then
    first &
    second &
    wait
    left=$((seconds - (SECONDS - begin)))
    ((left > 20)) && timeout "$left" torchrun --nproc-per-node 2 -m benchmarks.speed.calibrate --layers 2 --across --out "$out" >>"$out/across.log" 2>&1
else
    first
    second
fi
python - "$out" <<'PYTHON'
import json, pathlib, sys
from benchmarks._results import machine_name
pathlib.Path(sys.argv[1], "machine.json").write_text(json.dumps(machine_name()))
PYTHON
cat "$out/failed.log" 2>/dev/null
exit 0
