#!/usr/bin/env bash
# The GPU benchmark; every row is written as it comes.
#
#   bash benchmarks/speed/run.sh kernels OUT [SECONDS] [GPU]          linears, memory, attention and head (one GPU to itself)
#   bash benchmarks/speed/run.sh models  OUT [SECONDS] [GPU]          both models (one GPU to itself)
#   bash benchmarks/speed/run.sh all     OUT [SECONDS] [GPU]          both at once
#   bash benchmarks/speed/run.sh calibration OUT [SECONDS] [GPU]      calibration of a few blocks
#   bash benchmarks/speed/run.sh across  OUT [SECONDS] GPU GPU        calibration on two GPUs
#   bash benchmarks/speed/run.sh tune    OUT [SECONDS] [GPU]          launch settings, to OUT/launches.json
#   python -m benchmarks.speed.collect OUT                            afterwards, where git is
#
# A step that fails or takes too long is left out and the next one goes on.
set -u
part="$1" out="$2" seconds="${3:-300}" first="${4:-0}" second="${5:-1}" begin=$SECONDS
shape="${SHAPE:-8b}" blocks="${BLOCKS:-3}"
mkdir -p "$out"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-6}"

step() { # step GPU LIMIT LOG COMMAND...
    local gpu="$1" limit="$2" log="$3" left=$((seconds - (SECONDS - begin)))
    shift 3
    ((left < 8)) && return
    CUDA_VISIBLE_DEVICES="$gpu" timeout $((left < limit ? left : limit)) "$@" --out "$out" >>"$out/$log.log" 2>&1 ||
        echo "step failed or ran out of time: $*" >>"$out/failed.log"
    echo "$part, $((SECONDS - begin)) s: $*" >>"$out/steps.log"
}

case "$part" in
tune)
    OMP_NUM_THREADS=1 step "$first" $((seconds / 2)) compile python -m benchmarks.speed.tune --compile-only --workers "${WORKERS:-24}"
    step "$first" "$seconds" tune python -m benchmarks.speed.tune --seconds $((seconds / 2 - 8))
    ;;
kernels)
    step "$first" 120 linear python -m benchmarks.speed.linear --seconds "${LINEAR:-90}"
    step "$first" 30 roof python -m benchmarks.speed.roof
    step "$first" 60 step python -m benchmarks.speed.step --seconds 50
    ;;
models)
    # compilers side by side on the CPU, timed sections one after the other
    export SPEED_LOCK="$out/lock" TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-3}"
    model() { step "$first" "$seconds" "$1" python -m benchmarks.speed.model --shape "$shape" "${@:2}" & }
    model bf16_compile --provider bf16 --run compile
    model fastest_compile --provider freeact --run compile
    model bf16_parts --provider bf16 --run parts
    for tier in freeact-fastest freeact-fast freeact; do
        model "${tier}_parts" --provider freeact --run parts --preset "$tier"
    done
    model fastest_memory --provider freeact --run memory
    model fastest_plain_memory --provider freeact --run memory --embedding-bits 16
    wait
    ;;
all)
    export SPEED_LOCK="$out/lock"
    bash "$0" models "$out" "$seconds" "$first" &
    bash "$0" kernels "$out" "$seconds" "$first"
    wait
    ;;
calibration)
    step "$first" 120 calibrate python -m benchmarks.speed.calibrate --shape "$shape" --layers "$blocks"
    ;;
across)
    step "$first,$second" 110 across torchrun --nproc-per-node 2 -m benchmarks.speed.calibrate --shape "$shape" \
        --layers "$blocks" --across
    ;;
esac
python -c "import json; from tools.result_files import machine_name; print(json.dumps(machine_name()))" >"$out/machine.json"
cat "$out/steps.log" "$out/failed.log" 2>/dev/null
exit 0
