#!/usr/bin/env bash
# The GPU benchmark; every row is written as it comes.
#
#   bash benchmarks/speed/run.sh kernels OUT [SECONDS] [GPU]          linears, our model (one GPU to itself)
#   bash benchmarks/speed/run.sh models  OUT [SECONDS] [GPU] [GPU]    the bf16 model and calibration (one or two GPUs)
#   bash benchmarks/speed/run.sh tune    OUT [SECONDS] [GPU]          launch settings, to OUT/launches.json
#   python -m benchmarks.speed.collect OUT                            afterwards, where git is
#
# A step that fails or takes too long is left out and the next one goes on.
set -u
part="$1" out="$2" seconds="${3:-200}" first="${4:-0}" second="${5:-}" begin=$SECONDS
mkdir -p "$out"
export PYTHONPATH=. PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-6}"

step() { # step GPU LIMIT LOG MODULE ARGUMENTS...
    local gpu="$1" limit="$2" log="$3" left=$((seconds - (SECONDS - begin)))
    shift 3
    ((left < 8)) && return
    CUDA_VISIBLE_DEVICES="$gpu" timeout $((left < limit ? left : limit)) python -m "$@" --out "$out" >>"$out/$log.log" 2>&1 ||
        echo "step failed or ran out of time: $*" >>"$out/failed.log"
    echo "$((SECONDS - begin)) s: $*" >>"$out/steps.log"
}

case "$part" in
tune)
    OMP_NUM_THREADS=1 step "$first" $((seconds / 2)) compile benchmarks.speed.tune --compile-only --workers "${WORKERS:-24}"
    step "$first" "$seconds" tune benchmarks.speed.tune --seconds $((seconds / 2 - 8))
    ;;
kernels)
    step "$first" 45 model benchmarks.speed.model --provider freeact --run graph
    step "$first" 62 linear benchmarks.speed.linear --seconds 50
    step "$first" 100 model benchmarks.speed.model --provider freeact --run compile --skip-compiled-prefill
    ;;
models)
    step "$first" 110 calibrate benchmarks.speed.calibrate --layers 2 &
    if [[ -z "$second" ]]; then wait; fi
    step "${second:-$first}" 40 model benchmarks.speed.model --provider bf16 --run graph
    step "${second:-$first}" 100 model benchmarks.speed.model --provider bf16 --run compile --skip-compiled-prefill
    wait
    left=$((seconds - (SECONDS - begin)))
    if [[ -n "$second" ]] && ((left > 20)); then
        CUDA_VISIBLE_DEVICES="$first,$second" timeout "$left" torchrun --nproc-per-node 2 -m benchmarks.speed.calibrate \
            --layers 2 --across --out "$out" >>"$out/across.log" 2>&1
        echo "$((SECONDS - begin)) s: calibration on two GPUs" >>"$out/steps.log"
    fi
    ;;
esac
python -c "import json; from benchmarks._results import machine_name; print(json.dumps(machine_name()))" >"$out/machine.json"
cat "$out/steps.log" "$out/failed.log" 2>/dev/null
exit 0
