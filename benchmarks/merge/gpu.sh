#!/bin/bash
# Every merge benchmark that wants a GPU, rows written as they come, so that a run that is cut off leaves what it has:
#
#   python benchmarks/merge/kit.py --out KIT                          # once, on any CPU
#   CONCORD_ASSETS=ASSETS GPUS="0 1 2" benchmarks/merge/gpu.sh OUT KIT      # all parts, about ten minutes
#   PARTS=adapt GPUS=3 WORKERS=8 benchmarks/merge/gpu.sh OUT KIT      # one of them
#   CONCORD_ASSETS=ASSETS COLLECT=1 benchmarks/merge/gpu.sh OUT KIT   # result files of the rows in OUT, anywhere
#
# PARTS of `h100 adapt gate relatives`. The big pair (`h100`) wants a GPU to itself: the first where there are several, else it
# goes first. The others share the rest, WORKERS processes of the adaptation on each, side by side; LIMIT (350) is the seconds
# that they have. ASSETS holds smollm2/, qwen2.5/, gemma3-270m/ and handbook/text.txt. OUT receives result files, the rows
# behind them and a log per step. Needs torch, transformers, safetensors, scipy and tqdm; POT for the widened relative.
cd "$(dirname "$0")/../.." || exit 1
OUT=$(realpath -m "$1") KIT=$(realpath -m "$2")
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-350} WORKERS=${WORKERS:-7} ADAPT=${ADAPT:-} TINY=${TINY:-}
PARTS=" ${PARTS:-h100 adapt gate relatives} " SCRATCH=${SCRATCH:-$OUT/scratch}
read -r -a GPUS <<<"${GPUS:-0}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT/rows" "$OUT/logs"

wanted() { [[ $PARTS == *" $1 "* ]]; }

# step NAME GPU SECONDS COMMAND...
step() {
    local name=$1 gpu=$2 limit=$3 start=$SECONDS
    shift 3
    CUDA_VISIBLE_DEVICES=$gpu timeout -k 5 "$limit" "$@" >>"$OUT/logs/$name.log" 2>&1
    echo "[$SECONDS s] $name: exit $?, $((SECONDS - start)) s; $(grep -v '^$' "$OUT/logs/$name.log" | tail -n 1 | cut -c1-300)"
}

small() { # small GPU...
    local last=${*: -1} gpu worker
    if wanted adapt; then
        rm -rf "$SCRATCH" # claims of an earlier run
        for worker in $(seq 1 "$WORKERS"); do
            for gpu in "$@"; do
                step "adapt-$gpu-$worker" "$gpu" "$LIMIT" $PYTHON benchmarks/merge/adaptation.py --device "$DEVICE" --kit "$KIT" \
                    --scratch "$SCRATCH" --rows "$OUT/rows/adapt-$gpu-$worker.jsonl" $ADAPT &
            done
        done
    fi
    if wanted gate; then
        step gate "$last" "$LIMIT" $PYTHON benchmarks/merge/gate.py --kit "$KIT" --device "$DEVICE" ${TINY:+--seeds 0} &
    fi
    if wanted relatives; then
        for copy in permuted deepened rotated "permuted and rotated" widened; do
            step "relatives-${copy// /-}" "$last" "$LIMIT" $PYTHON benchmarks/merge/relatives.py --device "$DEVICE" \
                --copies "$copy" --rows "$OUT/rows/relatives-${copy// /-}.jsonl" ${TINY:+--steps 1 --eval-tokens 200} &
        done
    fi
    wait
    rm -rf "$SCRATCH"
}

big() {
    if wanted h100; then
        step h100 "${GPUS[0]}" 240 $PYTHON benchmarks/merge/h100.py --device "$DEVICE" ${TINY:+--tiny}
    fi
}

if [ -z "$COLLECT" ]; then
    if [ "${#GPUS[@]}" = 1 ]; then big; small "${GPUS[@]}"; elif wanted h100; then big & small "${GPUS[@]:1}" & wait; else small "${GPUS[@]}"; fi
fi
for part in adapt:adaptation relatives:relatives; do
    mapfile -t found < <(find "$OUT/rows" -name "${part%%:*}*.jsonl" | sort)
    extra=(); [ "$part" = adapt:adaptation ] && extra=(--kit "$KIT")
    [ "${#found[@]}" = 0 ] || $PYTHON "benchmarks/merge/${part##*:}.py" "${extra[@]}" --collect "${found[@]}"
done
for name in h100 gate adaptation relatives; do
    [ "benchmarks/results/merge_$name.json" -nt "$OUT/rows" ] && cp "benchmarks/results/merge_$name.json" "$OUT/"
done
ls -l "$OUT"
