#!/usr/bin/env python3
"""suasion beside its peers on this machine, in one run.

    benches/side_by_side.py step    [--rounds 3] [--steps 5]   a training step against PyTorch eager f32, with and
                                                               without AVX-512, all rows and supervised rows
    benches/side_by_side.py prepare [--rounds 3]               tokenise and mask against TRL with two processes, and
                                                               against gigatoken's encoding alone
    benches/side_by_side.py scale   [--scratch DIR]            memory for 20 thousand and 2 million rows (11 GB of disk)

Peers run in the Python given by --python (default: $SUASION_PEERS_PYTHON, else python3), which needs
`pip install torch transformers trl peft datasets gigatoken`; their scripts are in --shared (default ../shared).
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


# What decides which vector code runs.
FEATURES = ("fma", "avx2", "avx512f", "avx512_bf16", "amx_tile")


def cpu():
    for line in open("/proc/cpuinfo"):
        if line.startswith(("model name", "cpu family", "model\t", "flags")):
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
            "features": [flag for flag in FEATURES if flag in dict(cpu())["flags"].split()],
            "commit": commit.stdout.strip(),
        }

    def add(self, **line):
        with open(self.path, "a") as file:
            file.write(json.dumps({**self.head, **line}) + "\n")
        print(json.dumps(line), flush=True)


def cargo(*arguments):
    subprocess.run(["cargo", "build", "--release", "--quiet", *arguments], cwd=ROOT, check=True)
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"


# Instruction sets that a step is measured with: how each side is kept to one.
LEVELS = {
    "avx512": ([], {}),
    "avx2": (["--no-default-features"],
             {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
}  # fmt: skip


def step(options, results):
    """A training step with all rows through the head, and with supervised rows only, on both sides.

    supervised / supervised is equal work: what the engine gains. PyTorch's all / supervised is what the mask saves.
    """
    flags = open("/proc/cpuinfo").read()
    levels = [level for level in LEVELS if level != "avx512" or "avx512f" in flags]
    for level in levels:
        features, environment = LEVELS[level]
        # A copy: the next build replaces the example.
        built = cargo("-p", "suasion-engine", "--example", "step", *features) / "examples" / "step"
        with tempfile.TemporaryDirectory() as folder:
            ours = shutil.copy(built, folder)
            peer = [options.python, options.shared / "spike" / "step.py"]
            sides = {
                "torch all": [*peer, "fp32", str(options.steps)],
                "torch supervised": [*peer, "fp32g", str(options.steps)],
                "suasion all": [ours, str(options.steps), "all"],
                "suasion supervised": [ours, str(options.steps), "supervised"],
            }
            seconds = {side: [] for side in sides}
            memory = {side: [] for side in sides}
            for turn in range(options.rounds):
                for side, command in sides.items():
                    raw = json.loads(run(command, **environment)[0].strip().splitlines()[-1])
                    results.add(bench="step", level=level, side=side, round=turn, **raw)
                    seconds[side] += raw["tot"]
                    memory[side].append(raw["rss_mb"])
        s = {side: statistics.median(v) for side, v in seconds.items()}
        m = {side: statistics.median(v) for side, v in memory.items()}
        results.add(
            bench="step", level=level, side="ratio",
            seconds={side: round(v, 3) for side, v in s.items()}, mb=m,
            whole=round(s["suasion supervised"] / s["torch all"], 3),
            engine=round(s["suasion supervised"] / s["torch supervised"], 3),
            mask=round(s["torch supervised"] / s["torch all"], 3),
            memory=round(m["suasion supervised"] / m["torch all"], 3),
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


def trl_prepares(options, folder, kind):
    """TRL with two processes. Its clock starts after its imports and after the rows are read."""
    out, _, _ = run([options.python, options.shared / "peers" / "trl_prepare.py", folder, kind, "2"])
    line = next(line for line in out.splitlines() if line.startswith("TRL"))
    found = re.search(r"rows=(\d+) tokens=(\d+) ([\d.]+)s .* (\d+) tok/s maxrss (\d+)MB", line)
    rows, tokens, wall, rate, mb = found.groups()
    return {"rows": int(rows), "tokens": int(tokens), "seconds": float(wall), "tokens_per_second": int(rate),
            "rss_mb": int(mb)}  # fmt: skip


def gigatoken_encodes(options, model, rows):
    """gigatoken on two threads: ids only, no mask, nothing written. Its clock starts when the texts are in memory."""
    out, _, _ = run([options.python, ROOT / "benches" / "gigatoken_encode.py", model, rows], RAYON_NUM_THREADS="2")
    return json.loads(out.strip().splitlines()[-1])


def prepare(options, results):
    ours = cargo("-p", "suasion") / "suasion"
    peers = options.shared / "peers"
    with tempfile.TemporaryDirectory() as folder:
        run([options.python, peers / "make_rows.py", folder])
        run([options.python, peers / "make_distinct.py", folder])
        model = model_folder(options, folder)
        # Rows of `pc` and `msgs` repeat 675 texts, which flatters a tokenizer's cache; no text of `distinct` stands twice.
        for kind in ("distinct", "pc", "msgs"):
            file = f"{folder}/{kind}.jsonl"
            sides = {
                "trl": lambda: trl_prepares(options, folder, kind),
                "suasion": lambda: ours_prepares(ours, model, file, f"{folder}/out.jsonl"),
            }
            if kind != "msgs":
                sides["gigatoken"] = lambda: gigatoken_encodes(options, model, file)
            rates = {side: [] for side in sides}
            for turn in range(options.rounds):
                for side, measure in sides.items():
                    raw = measure()
                    results.add(bench="prepare", file=kind, side=side, round=turn, **raw)
                    rates[side].append(raw["tokens_per_second"])
            r = {side: statistics.median(v) for side, v in rates.items()}
            results.add(bench="prepare", file=kind, side="ratio", tokens_per_second=r,
                        times_trl=round(r["suasion"] / r["trl"], 2),
                        times_gigatoken=round(r["suasion"] / r["gigatoken"], 2) if "gigatoken" in r else None)  # fmt: skip


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
