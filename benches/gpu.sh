#!/bin/bash
# What a card shows that an emulation cannot, in one script of at most 25 minutes for a borrowed card.
#
#     benches/gpu.sh build     anywhere with Rust: builds the tests and the timed program into target/gpu
#     benches/gpu.sh           on the machine with the card, which needs neither Rust nor a network: the checks, then
#                              speed and memory, against PyTorch where SUASION_PEERS_PYTHON (default: python3) has it
#     benches/gpu.sh checks | speed     one half of it
#
# Raw results go to ${OUT:-benches/results}/gpu-<card>.jsonl and .log; the end says what failed. The exit code is that of
# the checks.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
built=$root/target/gpu
python=${SUASION_PEERS_PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-1500}))
tests="kernels optimizers soundness cuda card_steps"
# Of two cards, where there are two.
over_cards=cards

if [ "${1:-}" = build ]; then
    rm -rf "$built"
    mkdir -p "$built"
    # Test programs look for the goldens beside the source that they were compiled from.
    echo "$root" >"$built/root"
    cargo build --release -p suasion-engine --example card || exit 1
    cargo build --release -p suasion || exit 1
    cp target/release/examples/card target/release/suasion "$built/"
    for test in $tests $over_cards; do
        program=$(cargo test --release -p suasion-engine --test "$test" --no-run --message-format=json |
            "$python" -c 'import json, sys
for line in sys.stdin:
    entry = json.loads(line)
    if entry.get("executable") and entry["target"]["kind"] == ["test"]: print(entry["executable"])') || exit 1
        cp "$program" "$built/test-$test"
    done
    strip "$built"/* 2>/dev/null
    ls -l "$built"
    exit 0
fi

[ -x "$built/card" ] || { echo "build it first, where Rust is: benches/gpu.sh build"; exit 2; }
source_root=$(cat "$built/root")
if [ "$source_root" != "$root" ] && [ ! -e "$source_root" ]; then
    mkdir -p "$(dirname "$source_root")" && ln -s "$root" "$source_root" || exit 2
fi
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr ' /' '--')
out=${OUT:-$root/benches/results}
mkdir -p "$out"
results=$out/gpu-${card:-unknown}.jsonl
log=$out/gpu-${card:-unknown}.log
failed=0

# Runs a command within what is left of the time, at most $1 seconds.
within() {
    local most=$1 left=$((deadline - SECONDS))
    shift
    [ "$left" -gt 5 ] || { echo "no time left for: $*" | tee -a "$log"; return 1; }
    timeout "$((left < most ? left : most))" "$@"
}

{
    date -u
    nvidia-smi
} >>"$log" 2>&1

if [ "${1:-all}" != speed ]; then
    # Operations against the reference, optimizers, refusals; goldens of every family, layouts of products, the same
    # bytes twice, dropout, bases in files, memory.
    for test in $tests; do
        echo "== $test"
        if ! SUASION_CARD=${SUASION_CARD:-0} within 300 "$built/test-$test" --test-threads=1 >>"$log" 2>&1; then
            failed=1
            echo "failed: $test"
            grep -E "^test .*FAILED|panicked at" -A3 "$log" | tail -20
        fi
    done
    if command -v compute-sanitizer >/dev/null; then
        echo "== races and wrong addresses, by compute-sanitizer"
        for tool in memcheck racecheck; do
            SUASION_CARD=${SUASION_CARD:-0} within 200 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$built/test-cuda" --test-threads=1 bytes_do_not >>"$log" 2>&1 || { failed=1; echo "failed: $tool"; }
        done
    fi
    echo "== determinism of whole steps"
    for _ in 1 2; do within 60 "$built/card" tiny full-20 8 4; done 2>>"$log" |
        "$python" -c 'import json, sys
runs = [json.loads(line)["losses"] for line in sys.stdin]
sys.exit(len(runs) != 2 or runs[0] != runs[1])' || { failed=1; echo "failed: two runs differ"; }
    if [ "$(nvidia-smi -L 2>/dev/null | grep -c ^GPU)" -lt 2 ]; then
        echo "== two cards: skipped, there is one"
    else
        echo "== two cards: sums by NCCL, and what a lost rank does"
        SUASION_CARDS=${SUASION_CARDS:-0,1} within 200 "$built/test-$over_cards" --test-threads=1 >>"$log" 2>&1 ||
            { failed=1; echo "failed: $over_cards"; }
        echo "== two cards: runs of two processes"
        runs=$(mktemp -d)
        train() {
            within 120 "$built/suasion" train --model "$root/examples/persuasion" --data "$root/examples/persuasion/rows.jsonl" \
                --init random --device cuda --matmul_precision f32 --adam_epsilon 1e-4 --per_device_train_batch_size 2 "$@" >>"$log" 2>&1
        }
        for run in two again; do train --ranks 2 --max_steps 8 -o "$runs/$run" || { failed=1; echo "failed: $run"; }; done
        train --gradient_accumulation_steps 2 --max_steps 8 -o "$runs/one" || { failed=1; echo "failed: one"; }
        "$python" - "$runs" <<'SAME' || { failed=1; echo "failed: two cards differ from one"; }
import json, sys
lines = lambda run: map(json.loads, open(f"{sys.argv[1]}/{run}/metrics.jsonl"))
losses = lambda run: [line["loss"] for line in lines(run) if "loss" in line]
two, again, one = map(losses, ("two", "again", "one"))
sys.exit(not (len(two) == 8 and two == again and all(abs(a / b - 1) < 1e-4 for a, b in zip(two, one))))
SAME
        # One of the ranks is killed: the run ends by itself, and goes on from its checkpoint.
        train --ranks 2 --max_steps 100000 --save_steps 20 --save_total_limit 2 -o "$runs/killed" &
        killed=$!
        for _ in $(seq 600); do ls -d "$runs"/killed/checkpoint-* >/dev/null 2>&1 && break; sleep 0.1; done
        # RANK=1 is set in one of the processes that the launcher has started.
        for process in $(pgrep -x suasion); do
            tr '\0' '\n' <"/proc/$process/environ" 2>/dev/null | grep -qx RANK=1 && kill -KILL "$process"
        done
        code=0
        wait "$killed" || code=$?
        { [ "$code" = 3 ] && "$built/suasion" train --resume "$runs/killed" --ranks 2 --dry-run >>"$log" 2>&1; } ||
            { failed=1; echo "failed: a killed rank ended the run with $code"; }
        rm -rf "$runs"
    fi
    [ "$failed" = 0 ] && echo "all checks passed"
fi

if [ "${1:-all}" != checks ]; then
    echo "== speed and memory"
    ours() { within 150 "$built/card" "$@" 2>>"$log" | tee -a "$results" || echo "failed: suasion $*" | tee -a "$log"; }
    theirs() {
        "$python" -c "import torch, transformers; assert torch.cuda.is_available()" 2>/dev/null || return 0
        within 200 "$python" benches/gpu_torch.py "$@" 2>>"$log" | tee -a "$results"
        [ "${PIPESTATUS[0]}" = 0 ] || echo "failed: PyTorch $*" | tee -a "$log"
    }
    for of in "qwen2.5-0.5b full-all 16" "qwen2.5-0.5b full-20 16" "qwen2.5-1.5b full-all 8" "qwen2.5-1.5b full-20 8" \
        "qwen3-8b lora-all 4" "qwen3-8b lora-20 4"; do
        # shellcheck disable=SC2086
        { ours $of; theirs eager $of; theirs compile $of; }
        "$python" -c "import liger_kernel" 2>/dev/null && theirs liger $of
    done
    ours qwen2.5-0.5b full-shared 16
    ours qwen2.5-1.5b full-shared 8
    ours qwen3-8b lora-shared 8
    # What the host takes of a short step: with graphs, and without.
    ours qwen2.5-0.5b full-all 1 20
    SUASION_NO_GRAPHS=1 ours qwen2.5-0.5b full-all 1 20
    "$python" - "$results" <<'TABLE'
import json, sys
# GiB: all that the driver counts. Peak and planned: what was allocated at most, and what was planned of it.
print(f"{'':34} {'tokens/s':>10} {'GiB':>6} {'peak':>8} {'planned':>8} graphs")
gib = lambda bytes: bytes / 2**30 if bytes else float("nan")
for line in open(sys.argv[1]):
    run = json.loads(line)
    print(f"{run['impl'][:20]:20} {run['shape'][:12]:12} {run['mode']:11} {run['tokens_per_second']:10.0f}"
          f" {gib(run['used_bytes']):6.1f} {gib(run.get('peak_bytes')):8.2f} {gib(run.get('planned_bytes')):8.2f} {run.get('graphs', '')}")
TABLE
fi
exit "$failed"
