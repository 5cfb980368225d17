#!/usr/bin/env python3
"""suasion beside its peers on this machine, in one run.

    benches/side_by_side.py step    [--rounds 3] [--steps 5]   a training step against PyTorch eager f32
    benches/side_by_side.py prepare [--rounds 3]               tokenise and mask against TRL with two processes
    benches/side_by_side.py scale   [--scratch DIR]            memory for 20 thousand and 2 million rows (11 GB of disk)

Peers run in the Python given by --python (default: $SUASION_PEERS_PYTHON, else python3), which needs
`pip install torch transformers trl peft datasets`; their scripts are in --shared (default ../shared).
The two sides take turns, so that both meet the same conditions. Every raw line is appended to
benches/results/<cpu>.jsonl; the last line printed is the ratio of medians. Run on an otherwise idle machine.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
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


def model_folder(options, folder):
    """Qwen2.5's tokenizer and its chat template as one model folder, as TRL is given both."""
    material = options.shared / "material"
    model = pathlib.Path(folder) / "model"
    shutil.copytree(material / "tokenizers" / "qwen2_5", model)
    shutil.copy(material / "templates" / "trl" / "qwen2_5.jinja", model / "chat_template.jinja")
    return model


def ours_prepares(ours, model, rows, target):
    """Ours, timed from start to exit of the process: tokenizer, reading and writing included."""
    command = [ours, "prepare", "--data", rows, "--model", model, "-o", target, "--rebuild", "--json", "--quiet"]
    for setting in ("max_length=1024", "truncation_mode=keep_start", "on_bad_row=skip"):
        command += ["--set", setting]
    out, wall, mb = run(command)
    counts = json.loads(out)["counts"]
    return {"rows": counts["kept"], "tokens": counts["tokens"], "seconds": round(wall, 3),
            "tokens_per_second": round(counts["tokens"] / wall), "rss_mb": mb}  # fmt: skip


def prepare(options, results):
    ours = cargo("-p", "suasion") / "suasion"
    peers = options.shared / "peers"
    with tempfile.TemporaryDirectory() as folder:
        run([options.python, peers / "make_rows.py", folder])
        model = model_folder(options, folder)
        for kind in ("pc", "msgs"):
            rates = {"suasion": [], "trl": []}
            for turn in range(options.rounds):
                # TRL's clock starts after its imports and after the rows are read.
                out, _, _ = run([options.python, peers / "trl_prepare.py", folder, kind, "2"])
                line = next(line for line in out.splitlines() if line.startswith("TRL"))
                found = re.search(r"rows=(\d+) tokens=(\d+) ([\d.]+)s .* (\d+) tok/s maxrss (\d+)MB", line)
                rows, tokens, wall, rate, mb = found.groups()
                results.add(bench="prepare", file=kind, side="trl", round=turn, rows=int(rows), tokens=int(tokens),
                            seconds=float(wall), tokens_per_second=int(rate), rss_mb=int(mb))  # fmt: skip
                rates["trl"].append(int(rate))
                raw = ours_prepares(ours, model, f"{folder}/{kind}.jsonl", f"{folder}/out.jsonl")
                results.add(bench="prepare", file=kind, side="suasion", round=turn, **raw)
                rates["suasion"].append(raw["tokens_per_second"])
            r = {side: statistics.median(v) for side, v in rates.items()}
            results.add(bench="prepare", file=kind, side="ratio", suasion_tokens_per_second=r["suasion"],
                        trl_tokens_per_second=r["trl"], speed_ratio=round(r["suasion"] / r["trl"], 2))  # fmt: skip


def scale(options, results):
    """Peak memory for 20 thousand and for 2 million rows: the peers' file, and a hundred of it one after the other."""
    ours = cargo("-p", "suasion") / "suasion"
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        run([options.python, options.shared / "peers" / "make_rows.py", folder])
        model = model_folder(options, folder)
        small, large = f"{folder}/pc.jsonl", f"{folder}/large.jsonl"
        with open(large, "w") as out:
            for copy in range(100):
                with open(small) as rows:
                    # Each row keeps being the only one of its kind.
                    out.writelines(row.replace('"[', f'"[{copy}.', 1) for row in rows)
        for rows in (small, large):
            raw = ours_prepares(ours, model, rows, f"{folder}/out.jsonl")
            results.add(bench="scale", side="suasion", source_mb=os.path.getsize(rows) >> 20, **raw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["step", "prepare", "scale"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--python", default=os.environ.get("SUASION_PEERS_PYTHON", "python3"))
    parser.add_argument("--scratch", help="a folder on a large disk")
    parser.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    {"step": step, "prepare": prepare, "scale": scale}[options.bench](options, Results())


if __name__ == "__main__":
    main()
