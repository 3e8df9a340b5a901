#!/usr/bin/env bash
# The GPU benchmark; every row is written as it comes.
#
#   bash benchmarks/speed/run.sh kernels OUT [SECONDS] [GPU]          tuning, linears, our model (one GPU to itself)
#   bash benchmarks/speed/run.sh models  OUT [SECONDS] [GPU] [GPU]    the bf16 model and calibration (one or two GPUs)
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

if [[ "$part" == kernels ]]; then
    OMP_NUM_THREADS=1 step "$first" 40 compile benchmarks.speed.tune --compile-only --workers "${WORKERS:-24}" --seconds 38
    step "$first" 42 tune benchmarks.speed.tune --seconds 34
    [[ -s "$out/launches.json" ]] && export FREEACT_LAUNCHES="$out/launches.json"
    step "$first" 62 linear benchmarks.speed.linear --seconds 50
    step "$first" 40 model benchmarks.speed.model --provider freeact --run graph
    step "$first" 90 model benchmarks.speed.model --provider freeact --run compile
else
    step "$first" 60 calibrate benchmarks.speed.calibrate --layers 2 &
    if [[ -z "$second" ]]; then wait; fi
    step "${second:-$first}" 40 model benchmarks.speed.model --provider bf16 --run graph
    step "${second:-$first}" 75 model benchmarks.speed.model --provider bf16 --run compile
    wait
    left=$((seconds - (SECONDS - begin)))
    if [[ -n "$second" ]] && ((left > 20)); then
        CUDA_VISIBLE_DEVICES="$first,$second" timeout "$left" torchrun --nproc-per-node 2 -m benchmarks.speed.calibrate \
            --layers 2 --across --out "$out" >>"$out/across.log" 2>&1
        echo "$((SECONDS - begin)) s: calibration on two GPUs" >>"$out/steps.log"
    fi
fi
python -c "import json; from benchmarks._results import machine_name; print(json.dumps(machine_name()))" >"$out/machine.json"
cat "$out/steps.log" "$out/failed.log" 2>/dev/null
exit 0
