#!/usr/bin/env python3
"""suasion beside its peers on this machine, in one run.

    benches/side_by_side.py step    [--rounds 3] [--steps 5]   a training step against PyTorch eager f32
    benches/side_by_side.py prepare [--rounds 3]               tokenise and mask against TRL with two processes

Peers run in the Python given by --python (default: $SUASION_PEERS_PYTHON, else python3), which needs
`pip install torch transformers trl peft datasets`; their scripts are in --shared (default ../shared).
The two sides take turns, so that both meet the same weather. Every raw line is appended to
benches/results/<cpu>.jsonl; the last line printed is the ratio of medians. Run on an otherwise idle machine.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def cpu():
    for line in open("/proc/cpuinfo"):
        if line.startswith(("model name", "cpu family", "model\t")):
            key, value = (part.strip() for part in line.split(":", 1))
            yield key, value
        if line.strip() == "":
            return


def machine():
    facts = dict(cpu())
    return f"{facts.get('model name', 'cpu')} family {facts.get('cpu family', '?')}, {os.cpu_count()} cores"


def run(command, **environment):
    """Runs a command; its standard output, wall seconds and peak resident MiB (of it and its children)."""
    before = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - before
    if status != 0:
        sys.exit(f"{' '.join(map(str, command))} failed with {status}")
    return out, seconds, usage.ru_maxrss // 1024


class Results:
    """Raw lines, kept by machine."""

    def __init__(self):
        name = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
        self.path = ROOT / "benches" / "results" / f"{name}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.head = {
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "commit": commit.stdout.strip(),
        }

    def add(self, **line):
        with open(self.path, "a") as file:
            file.write(json.dumps({**self.head, **line}) + "\n")
        print(json.dumps(line), flush=True)


def cargo(*arguments):
    subprocess.run(["cargo", "build", "--release", "--quiet", *arguments], cwd=ROOT, check=True)
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"


def step(options, results):
    ours = cargo("-p", "suasion-engine", "--example", "step") / "examples" / "step"
    seconds, memory = {"suasion": [], "torch": []}, {"suasion": [], "torch": []}
    for turn in range(options.rounds):
        for side, command in (
            ("torch", [options.python, options.shared / "spike" / "step.py", "fp32", str(options.steps)]),
            ("suasion", [ours, str(options.steps), "supervised"]),
        ):
            raw = json.loads(run(command)[0].strip().splitlines()[-1])
            results.add(bench="step", side=side, round=turn, **raw)
            seconds[side] += raw["tot"]
            memory[side].append(raw["rss_mb"])
    s = {side: statistics.median(v) for side, v in seconds.items()}
    m = {side: statistics.median(v) for side, v in memory.items()}
    results.add(
        bench="step", side="ratio", suasion_s=round(s["suasion"], 3), torch_s=round(s["torch"], 3),
        time_ratio=round(s["suasion"] / s["torch"], 3), suasion_mb=m["suasion"], torch_mb=m["torch"],
        memory_ratio=round(m["suasion"] / m["torch"], 3),
    )  # fmt: skip


def prepare(options, results):
    ours = cargo("-p", "suasion") / "suasion"
    peers = options.shared / "peers"
    rates = {"suasion": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        run([options.python, peers / "make_rows.py", folder])
        model = options.shared / "material" / "tokenizers" / "qwen2_5"
        for turn in range(options.rounds):
            out, _, _ = run([options.python, peers / "trl_prepare.py", folder, "pc", "2"])
            line = next(line for line in out.splitlines() if line.startswith("TRL"))
            found = re.search(r"rows=(\d+) tokens=(\d+) ([\d.]+)s .* (\d+) tok/s maxrss (\d+)MB", line)
            rows, tokens, wall, rate, mb = found.groups()
            results.add(bench="prepare", side="trl", round=turn, rows=int(rows), tokens=int(tokens),
                        seconds=float(wall), tokens_per_second=int(rate), rss_mb=int(mb))  # fmt: skip
            rates["trl"].append(int(rate))
            # Ours is timed from start to exit of the process, tokenizer, reading and writing included; TRL's
            # clock starts after its imports and after the rows are read.
            target = pathlib.Path(folder) / "out.jsonl"
            command = [ours, "prepare", "--data", f"{folder}/pc.jsonl", "--model", model, "-o", target,
                       "--set", "max_length=1024", "--set", "truncation_mode=keep_start", "--quiet"]  # fmt: skip
            _, wall, mb = run(command)
            with open(target) as file:
                lengths = [len(json.loads(line)["input_ids"]) for line in file]
            rate = round(sum(lengths) / wall)
            results.add(bench="prepare", side="suasion", round=turn, rows=len(lengths), tokens=sum(lengths),
                        seconds=round(wall, 3), tokens_per_second=rate, rss_mb=mb)  # fmt: skip
            rates["suasion"].append(rate)
    r = {side: statistics.median(v) for side, v in rates.items()}
    results.add(bench="prepare", side="ratio", suasion_tokens_per_second=r["suasion"],
                trl_tokens_per_second=r["trl"], speed_ratio=round(r["suasion"] / r["trl"], 2))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["step", "prepare"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--python", default=os.environ.get("SUASION_PEERS_PYTHON", "python3"))
    parser.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    {"step": step, "prepare": prepare}[options.bench](options, Results())


if __name__ == "__main__":
    main()
