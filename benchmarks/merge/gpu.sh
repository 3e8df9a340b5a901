#!/bin/bash
# Every merge benchmark that wants GPUs, on two of them (or one), in about five minutes:
#
#   CONCORD_ASSETS=ASSETS benchmarks/merge/gpu.sh OUT KIT
#
# ASSETS holds smollm2/ and handbook/text.txt, and qwen2.5/ or gemma3-270m/ only where KIT lacks that pair; KIT is the folder
# that benchmarks/merge/kit.py wrote. Each step has its own time limit and a failing step stops no other. OUT receives the
# result files, the rows behind them and one log per step. Needs torch, transformers, safetensors, scipy and tqdm.
cd "$(dirname "$0")/../.." || exit 1
OUT=$(realpath -m "$1") KIT=$(realpath -m "$2")
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} STEPS=${STEPS:-} TINY=${TINY:-}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
GPUS=$($PYTHON -c "import torch; print(max(1, torch.cuda.device_count()))")
SECOND=$((GPUS > 1 ? 1 : 0)) ALL=$([ "$GPUS" -gt 1 ] && echo 0,1 || echo 0)
mkdir -p "$OUT/rows" "$OUT/logs"

# step NAME GPU SECONDS COMMAND...
step() {
    local name=$1 gpu=$2 limit=$3 start=$SECONDS
    shift 3
    CUDA_VISIBLE_DEVICES=$gpu timeout "$limit" "$@" >"$OUT/logs/$name.log" 2>&1
    echo "[$SECONDS s] $name: exit $?, $((SECONDS - start)) s; $(grep -v '^$' "$OUT/logs/$name.log" | tail -n 1 | cut -c1-300)"
}

adapt() { # adapt TASK GPU: its kit, where the donor is here and the kit is not; then three seeds side by side
    if [ ! -f "$KIT/$1/real.safetensors" ]; then
        step "kit-$1" "$2" 150 $PYTHON benchmarks/merge/kit.py "$1" --out "$KIT" --device "$DEVICE"
    fi
    [ -f "$KIT/$1/real.safetensors" ] || { echo "no kit for $1: its adaptation is left out"; return; }
    for seed in 0 1 2; do
        step "adapt-$1-$seed" "$2" 290 $PYTHON benchmarks/merge/adaptation.py --tasks "$1" --seeds $seed --kit "$KIT" \
            --device "$DEVICE" $STEPS --rows "$OUT/rows/adapt-$1-$seed.jsonl" &
    done
    wait
}

relatives() { # relatives GPU COPY...: one process per copy
    local gpu=$1
    shift
    for copy in "$@"; do
        step "relative-${copy// /-}" "$gpu" 280 $PYTHON benchmarks/merge/relatives.py --device "$DEVICE" \
            --copies "$copy" --rows "$OUT/rows/relative-${copy// /-}.jsonl" ${TINY:+--steps 2 --eval-tokens 200} &
    done
    wait
}

first() { # the big pair has its GPU to itself
    step h100 0 200 $PYTHON benchmarks/merge/h100.py --device "$DEVICE" ${TINY:+--tiny}
    adapt code 0
    step gate 0 120 $PYTHON benchmarks/merge/gate.py --kit "$KIT" --device "$DEVICE"
}

second() {
    relatives "$SECOND" permuted deepened rotated "permuted and rotated" widened
    adapt french "$SECOND"
}

if [ "$SECOND" = 0 ]; then first; second; else first & second & wait; fi
for task in adapt:adaptation relative:relatives; do
    found=$(ls "$OUT/rows/${task%%:*}"-*.jsonl 2>/dev/null) || continue
    mapfile -t parts <<<"$found"
    step "collect-${task##*:}" "$ALL" 60 $PYTHON "benchmarks/merge/${task##*:}.py" --collect "${parts[@]}"
done
for name in h100 h100_tiny gate adaptation relatives; do
    [ "benchmarks/results/merge_$name.json" -nt "$KIT" ] && cp "benchmarks/results/merge_$name.json" "$OUT/"
done
tar -C "$OUT" -czf "$OUT/rows_and_logs.tar.gz" rows logs && rm -r "$OUT/rows" "$OUT/logs"
ls -l "$OUT"
