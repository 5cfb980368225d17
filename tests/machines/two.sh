#!/bin/bash
# Ranks on two "machines": two network namespaces of this one, each with an address of its own, joined by a virtual cable that
# is pulled in the middle of a run. Needs root and iproute2, so it is no part of .ci/run; takes about two minutes.
#
#     tests/machines/two.sh target/debug/suasion
#
# 1. A run over both ends, and its losses are those of one process that accumulates.
# 2. Without the cable both ranks end by themselves within 60 seconds, with a message and a checkpoint that is whole, and
#    the run goes on from it.
set -euo pipefail
suasion=$(realpath "${1:?the program}")
work=$(mktemp -d)
names=(suasion-one suasion-two)
clean() {
    for name in "${names[@]}"; do ip netns delete "$name" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean EXIT
for n in 0 1; do
    ip netns add "${names[n]}"
    ip -n "${names[n]}" link set lo up
done
ip link add cable0 netns "${names[0]}" type veth peer name cable1 netns "${names[1]}"
for n in 0 1; do
    ip -n "${names[n]}" address add "10.77.0.$((n + 1))/24" dev "cable$n"
    ip -n "${names[n]}" link set "cable$n" up
done

cd "$work"
"$suasion" train --demo --max_steps 1 -o demo --quiet >/dev/null 2>&1
settings=(--model demo/model --data demo/data/train.jsonl --init random --threads 1 --seed 1 --adam_epsilon 1e-4
    --eval_fraction 0.1 --per_device_train_batch_size 1)

# Starts rank $1 with the rest as further arguments.
rank() {
    local n=$1
    shift
    ip netns exec "${names[n]}" env RANK="$n" LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 \
        MASTER_PORT=29500 SUASION_RUN_TOKEN=two "$suasion" train "${settings[@]}" "$@"
}

echo "== a run over two machines"
rank 1 --max_steps 6 -o two 2>second.log &
rank 0 --max_steps 6 -o two 2>first.log
wait $!
ip -n "${names[0]}" -s link show cable0 | awk '/TX:/ { getline; print "bytes sent by rank 0: " $1 }'
"$suasion" train "${settings[@]}" --gradient_accumulation_steps 2 --max_steps 6 -o one --quiet 2>/dev/null
python3 - <<'CHECK'
import json
read = lambda run: [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
two, one = read("two"), read("one")
assert len(two) == len(one)
losses = [(a["loss"], b["loss"]) for a, b in zip(two, one) if "loss" in a]
assert losses and all(abs(a / b - 1) < 1e-5 for a, b in losses), losses
print("losses as in one process:", " ".join(f"{a:.6f}" for a, _ in losses))
CHECK

echo "== the cable is pulled"
rank 1 --max_steps 100000 --save_steps 5 --save_total_limit 2 -o cut 2>second.log &
second=$!
rank 0 --max_steps 100000 --save_steps 5 --save_total_limit 2 -o cut 2>first.log &
first=$!
until ls -d cut/checkpoint-* >/dev/null 2>&1; do sleep 0.1; done
ip -n "${names[0]}" link set cable0 down
start=$SECONDS
codes=()
for process in $first $second; do
    code=0
    wait "$process" || code=$?
    codes+=("$code")
done
took=$((SECONDS - start))
echo "both have ended after $took seconds, with exit codes ${codes[*]}:"
grep -hA1 'error\[' first.log second.log
[ "${codes[*]}" = "3 3" ] && [ "$took" -le 60 ] || { echo "not as documented"; exit 1; }
newest=$(ls -d cut/checkpoint-* | sort -V | tail -1)
steps=$((${newest##*-} + 2))
"$suasion" train --resume cut --extend --max_steps "$steps" --gradient_accumulation_steps 2 2>&1 | tail -2
[ -e "cut/checkpoint-$steps" ] || { echo "the run has not gone on"; exit 1; }
echo "all as documented"
