"""Time and memory of `suasion verify` on 100,000 foreign rows of 30 million tokens, with tokenizer and chat template and without.

    peers/bin/python benches/verify_foreign.py SUASION MODEL [--rows 100000] [--tokens 345] [--runs 5] [--work DIR] [--results FILE]

MODEL is a folder with a tokenizer and a chat template. Conversations made here become rows of tokens with `suasion prepare`; of
these only `input_ids` and `labels` are kept, as int64 lists in Parquet, as `datasets` writes them. The rows are about --tokens
tokens long, no two alike. Each command runs once to warm the page cache, then --runs times; of each the best and the median time
are printed, its processor time and its largest resident set.
The targets are 2 s and 300 MB with the model, 1 s without, on two quiet cores. It ends with 1 where one is missed.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import pyarrow
import pyarrow.parquet

TARGETS = {"with the model": (2.0, 300), "without": (1.0, 300)}


def words(model):
    """Words that are one token each, the common ones first, so that files are as hard to compress as text is."""
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    names = [name for name, _ in sorted(vocab.items(), key=lambda item: item[1])]
    found = [name[1:] for name in names if name[0] in "\u0120\u2581" and name[1:].isascii() and name[1:].islower() and len(name) > 2]
    return found[:20_000], [1 / (10 + rank) for rank in range(len(found[:20_000]))]


def chats(model, n, tokens):
    """Conversations of one to three turns; about a word a token."""
    rng = random.Random(9)
    names, weights = words(model)
    bag = rng.choices(names, weights, k=1_000_000)
    for i in range(n):
        turns = 1 + i % 3
        each = (tokens - 30) // (2 * turns) - 16
        messages = [{"role": "system", "content": "Answer honestly and briefly."}]
        for turn in range(turns):
            for role in ("user", "assistant"):
                start = rng.randrange(len(bag) - 2 * each)
                text = " ".join(bag[start : start + rng.randint(each // 2, each * 3 // 2)])
                messages.append({"role": role, "content": f"{text.capitalize()}, {i}."})
        yield {"messages": messages}


def foreign(suasion, model, folder, rows, tokens):
    """The data set, made once."""
    path = folder / f"foreign-{rows}-{tokens}.parquet"
    if path.exists():
        return path
    raw, prepared, part = folder / "chats.jsonl", folder / "prepared.parquet", folder / "part.parquet"
    with raw.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in chats(model, rows, tokens))
    subprocess.run([suasion, "prepare", "-M", model, "-D", raw, "-o", prepared, "--quiet", "--rebuild"], check=True)
    source = pyarrow.parquet.ParquetFile(prepared)
    lists = pyarrow.list_(pyarrow.int64())
    schema = pyarrow.schema([("input_ids", lists), ("labels", lists)])
    with pyarrow.parquet.ParquetWriter(part, schema) as out:
        for batch in source.iter_batches(1000, columns=["input_ids", "labels"]):
            out.write_table(pyarrow.Table.from_batches([batch]).cast(schema), row_group_size=1000)
    part.rename(path)
    for made in folder.glob("prepared.parquet*"):
        made.unlink()
    raw.unlink()
    return path


# Runs a command from a small process: a child's largest resident set counts that of the process which started it.
CLOCK = """
import os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
error = child.stderr.read()
_, status, usage = os.wait4(child.pid, 0)
wall = time.perf_counter() - start
assert os.waitstatus_to_exitcode(status) in (0, 1), error.decode()
print(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
"""


def run(command):
    """Wall time, processor time, largest resident set in MB."""
    words = [sys.executable, "-S", "-c", CLOCK, *map(str, command)]
    return tuple(map(float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suasion", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=345)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=pathlib.Path, help="keeps the data set for another run")
    parser.add_argument("--results", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.work or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = foreign(args.suasion, args.model, folder, args.rows, args.tokens)
        counted = subprocess.run([args.suasion, "verify", "-D", path, "--json", "--max-findings", "0"], capture_output=True, text=True)
        size = {key: json.loads(counted.stdout)[key] for key in ("rows", "tokens")}
        print(f"{size['rows']:,} rows, {size['tokens']:,} tokens, {path.stat().st_size / 1e6:.0f} MB; {os.cpu_count()} cores")
        missed = False
        for what, flags in (("with the model", ["-M", args.model]), ("without", [])):
            command = [args.suasion, "verify", "-D", path, "--rows", "0", *flags]
            run(command)
            walls, cpus, sizes = zip(*(run(command) for _ in range(args.runs)))
            seconds, memory = TARGETS[what]
            met = min(walls) < seconds and max(sizes) < memory
            missed |= not met
            line = {"what": what, **size, "best_s": min(walls), "median_s": statistics.median(walls), "cpu_s": min(cpus), "rss_mb": max(sizes)}
            print(f"{what}: best {min(walls):.2f} s, median {statistics.median(walls):.2f} s, processor {min(cpus):.2f} s, "
                  f"{max(sizes):.0f} MB; target {seconds:.0f} s and {memory} MB: {'met' if met else 'MISSED'}", flush=True)
            if args.results:
                with args.results.open("a") as out:
                    out.write(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in line.items()}) + "\n")
    sys.exit(missed)


if __name__ == "__main__":
    main()
