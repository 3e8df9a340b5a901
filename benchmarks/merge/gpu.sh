#!/bin/bash
# Every merge benchmark that wants a GPU, claims before extras, rows written as they come:
#
#   CONCORD_ASSETS=ASSETS benchmarks/merge/gpu.sh OUT KIT             # all parts, about ten minutes
#   PARTS="adapt gate" SECOND=3 benchmarks/merge/gpu.sh ...           # some of them, on the fourth GPU, about six
#   PARTS=h100 FIRST=0 benchmarks/merge/gpu.sh ...                    # the big pair, which wants a GPU to itself
#
# The big pair runs on GPU FIRST (0), the others on SECOND (the next where there is one): one process per task and seed, one
# for the gate, one per kind of relative, side by side. Where both are the same GPU the big pair goes first. LIMIT (350) is
# the seconds that they have; what is measured by then counts. ASSETS holds smollm2/ and handbook/text.txt, and qwen2.5/ or
# gemma3-270m/ where KIT (the folder that benchmarks/merge/kit.py wrote) lacks written.safetensors of a pair, and its
# tokenizer for one of the controls. OUT receives the result files, the rows behind them and one log per step. Needs torch, transformers, safetensors, scipy and tqdm.
cd "$(dirname "$0")/../.." || exit 1
OUT=$(realpath -m "$1") KIT=$(realpath -m "$2")
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} STEPS=${STEPS:-} TINY=${TINY:-} LIMIT=${LIMIT:-350}
PARTS=" ${PARTS:-h100 adapt gate relatives} "
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
GPUS=$($PYTHON -c "import torch; print(max(1, torch.cuda.device_count()))")
FIRST=${FIRST:-0}
SECOND=${SECOND:-$(((FIRST + 1) % GPUS))}
mkdir -p "$OUT/rows" "$OUT/logs"
touch "$OUT/rows/started"

# step NAME GPU SECONDS COMMAND...
step() {
    local name=$1 gpu=$2 limit=$3 start=$SECONDS
    shift 3
    CUDA_VISIBLE_DEVICES=$gpu timeout -k 5 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1
    echo "[$SECONDS s] $name: exit $?, $((SECONDS - start)) s; $(grep -v '^$' "$OUT/logs/$name.log" | tail -n 1 | cut -c1-300)"
}

wanted() { [[ $PARTS == *" $1 "* ]]; }

adapt() { # adapt TASK: what the donor says and writes, where the kit lacks it; then three seeds side by side
    local began=$SECONDS
    if [ ! -f "$KIT/$1/written.safetensors" ]; then
        step "kit-$1" "$SECOND" 200 $PYTHON benchmarks/merge/kit.py "$1" --out "$KIT" --device "$DEVICE" --light
    fi
    [ -f "$KIT/$1/written.safetensors" ] || { echo "no kit for $1: its adaptation is left out"; return; }
    for seed in 0 1 2; do
        step "adapt-$1-$seed" "$SECOND" $((LIMIT - SECONDS + began)) $PYTHON benchmarks/merge/adaptation.py --tasks "$1" \
            --seeds $seed --kit "$KIT" --device "$DEVICE" $STEPS --rows "$OUT/rows/adapt-$1-$seed.jsonl" &
    done
    wait
}

small() {
    if wanted adapt; then adapt code & adapt french & fi
    if wanted gate; then
        step gate "$SECOND" "$LIMIT" $PYTHON benchmarks/merge/gate.py --kit "$KIT" --device "$DEVICE" ${TINY:+--seeds 0} &
    fi
    if wanted relatives; then
        for copy in permuted deepened rotated "permuted and rotated" widened; do
            step "relatives-${copy// /-}" "$SECOND" "$LIMIT" $PYTHON benchmarks/merge/relatives.py --device "$DEVICE" \
                --copies "$copy" --rows "$OUT/rows/relatives-${copy// /-}.jsonl" ${TINY:+--steps 2 --eval-tokens 200} &
        done
    fi
    wait
}

big() {
    if wanted h100; then
        step h100 "$FIRST" 240 $PYTHON benchmarks/merge/h100.py --device "$DEVICE" ${TINY:+--tiny}
    fi
}

if [ "$FIRST" = "$SECOND" ]; then big; small; else big & small & wait; fi
for part in adapt:adaptation relatives:relatives; do
    found=$(ls "$OUT/rows/${part%%:*}"*.jsonl 2>/dev/null) || continue
    mapfile -t parts <<<"$found"
    step "collect-${part##*:}" "$SECOND" 60 $PYTHON "benchmarks/merge/${part##*:}.py" --collect "${parts[@]}"
done
for name in h100 h100_tiny gate adaptation relatives; do
    [ "benchmarks/results/merge_$name.json" -nt "$OUT/rows/started" ] && cp "benchmarks/results/merge_$name.json" "$OUT/"
done
tar -C "$OUT" -czf "$OUT/rows_and_logs.tar.gz" rows logs && rm -r "$OUT/rows" "$OUT/logs"
ls -l "$OUT"
