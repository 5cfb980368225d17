#!/bin/bash
# Ranks that Slurm itself starts: a cluster of this machine alone, for as long as the script runs. Needs root and Debian's
# packages slurm-wlm and munge, so it is no part of .ci/run; takes about a minute.
#
#     tests/machines/slurm.sh target/debug/suasion
#
# A batch script whose `srun` starts two ranks; its losses are those of one process that accumulates; a task that is killed ends
# the run and leaves a checkpoint; a job that is cancelled stops where it can be resumed; `eval` is refused in a second task.
set -euo pipefail
suasion=$(realpath "${1:?the program}")
work=$(mktemp -d)
chmod 755 "$work"
mkdir "$work"/{state,spool,bin}
cp "$suasion" "$work/bin/"
export SLURM_CONF=$work/slurm.conf PATH=$work/bin:$PATH
clean() {
    for pid in "$work"/slurmd.pid "$work"/slurmctld.pid; do [ -e "$pid" ] && kill "$(cat "$pid")"; done
    sleep 2
    rm -rf "$work"
}
trap clean EXIT
if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
    mkdir -p /run/munge && chown munge /run/munge
    su -s /bin/sh munge -c /usr/sbin/munged
fi
host=$(hostname)
cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES State=UP
CONF
printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n' >"$work/cgroup.conf"
[ -e /sys/fs/cgroup/cgroup.controllers ] && printf 'CgroupPlugin=cgroup/v2\n' >"$work/cgroup.conf"
slurmctld
slurmd
until sinfo -h -o %t | grep -q idle; do sleep 0.2; done

cd "$work"
suasion train --demo --max_steps 1 -o demo --quiet >/dev/null 2>&1
settings="--model demo/model --data demo/data/train.jsonl --init random --adam_epsilon 1e-4 --eval_fraction 0.1"
cat >train.sbatch <<BATCH
#!/bin/bash
#SBATCH --job-name=suasion --ntasks=2 --cpus-per-task=1 --output=out.log
srun suasion train $settings --per_device_train_batch_size 2 --max_steps 6 --save_steps 3 -o out
srun --ntasks 1 suasion eval --model out --data demo/data/test.jsonl
BATCH
echo "== sbatch train.sbatch"
cat train.sbatch
sbatch --quiet --wait train.sbatch
cut -c1-140 out.log
# shellcheck disable=SC2086
suasion train $settings --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 6 -o one --quiet 2>/dev/null
python3 - <<'CHECK'
import json
lines = lambda run: map(json.loads, open(f"{run}/metrics.jsonl"))
read = lambda run: [line["loss"] for line in lines(run) if "loss" in line]
ours, theirs = read("out"), read("one")
assert 6 == len(ours) == len(theirs) and all(abs(a / b - 1) < 1e-5 for a, b in zip(ours, theirs)), (ours, theirs)
print("losses as in one process")
CHECK

# shellcheck disable=SC2086
endless() { srun --ntasks 2 suasion train $settings --max_steps 100000 --save_steps 5 --save_total_limit 2 -o "$1" >"$1.log" 2>&1; }
echo "== a task is killed"
code=0
endless killed & run=$!
until ls -d killed/checkpoint-* >/dev/null 2>&1; do sleep 0.1; done
for pid in $(pgrep -x suasion); do
    tr '\0' '\n' <"/proc/$pid/environ" | grep -q '^SLURM_PROCID=1$' && kill -KILL "$pid"
done
wait $run || code=$?
grep -A1 'error\[' killed.log
grep -q 'rank 1 was lost' killed.log && [ "$code" != 0 ] || { echo "not as documented"; exit 1; }

echo "== a job is cancelled"
code=0
endless cancelled & run=$!
until ls -d cancelled/checkpoint-* >/dev/null 2>&1; do sleep 0.1; done
scancel --name suasion
wait $run || code=$?
grep -A1 'interrupted' cancelled.log
grep -q 'suasion train --resume cancelled' cancelled.log || { echo "not as documented"; exit 1; }

echo "== eval in two tasks"
srun --ntasks 2 suasion eval --model out --data demo/data/test.jsonl --quiet >/dev/null 2>eval.log || true
grep -A1 'error\[' eval.log
grep -q 'this is task 1 of 2' eval.log || { echo "not as documented"; exit 1; }
echo "all as documented"
