#!/usr/bin/env python3
"""The Python package beside the program, in one run.

    benches/python.py prepare --data rows.jsonl --model MODEL [--copies 200] [--rounds 3]
        suasion.prepare from a pyarrow.Table, and `suasion prepare` from Parquet with the same rows
    benches/python.py verify [--tokens 30000000] [--model MODEL]
        suasion.verify of a datasets.Dataset of tokenised rows, without a tokenizer and with one
    benches/python.py all --data rows.jsonl --model MODEL
        both, in about two minutes

The two sides take turns; the last line of each is the ratio of medians, or the median. Run on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import suasion


def prepare(args: argparse.Namespace) -> None:
    lines = [json.loads(line) for line in open(args.data)]
    if not isinstance(lines[0].get("prompt"), str):
        sys.exit(f"{args.data}: rows with prompt and completion as text are needed: copies of them are made different")
    rows = [{**line, "prompt": f"{copy} {line['prompt']}"} for copy in range(args.copies) for line in lines]
    table = pa.Table.from_pylist(rows)
    del rows
    with tempfile.TemporaryDirectory() as name:
        path, out = pathlib.Path(name) / "rows.parquet", pathlib.Path(name) / "out.parquet"
        pq.write_table(table, path)
        command = [sys.executable, "-m", "suasion", "prepare", "--data", str(path), "--model", args.model, "-o", str(out)]
        # What starting costs is not the preparation's.
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "suasion", "--version"], check=True, stdout=subprocess.DEVNULL)
        idle = time.perf_counter() - start
        ours, theirs = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            subprocess.run([*command, "--rebuild", "--max_length", "1024"], check=True, capture_output=True)
            theirs.append(time.perf_counter() - start - idle)
            start = time.perf_counter()
            prepared = suasion.prepare(table, args.model, max_length=1024, progress=False)
            ours.append(time.perf_counter() - start)
            tokens = prepared.manifest["counts"]["tokens"]
            print(f"program {theirs[-1]:.2f} s, suasion.prepare {ours[-1]:.2f} s, {tokens:,} tokens", flush=True)
            assert pq.read_metadata(out).num_rows == len(prepared)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"suasion.prepare: {tokens / statistics.median(ours):,.0f} tokens/s, {ratio:.2f} times the program's speed")


def verify(args: argparse.Namespace) -> None:
    import datasets

    draw = random.Random(0)
    rows = []
    for _ in range(200):
        n = draw.randrange(200, 800)
        ids = [draw.randrange(1, 30000) for _ in range(n)]
        rows.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    some = datasets.Dataset.from_list(rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    whole = datasets.concatenate_datasets([some] * (args.tokens // tokens + 1))
    for model in [None, args.model] if args.model else [None]:
        times = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            report = suasion.verify(whole, model, progress=False)
            times.append(time.perf_counter() - start)
        what = "with a tokenizer" if model else "without a tokenizer"
        size = f"{report.summary['tokens']:,} tokens in {report.summary['rows']:,} rows, {len(report.findings):,} findings"
        print(f"suasion.verify {what}: {size}: {statistics.median(times):.2f} s (of {', '.join(f'{t:.2f}' for t in times)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "verify", "all"])
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=30_000_000)
    args = parser.parse_args()
    if args.what != "verify":
        prepare(args)
    if args.what != "prepare":
        verify(args)


if __name__ == "__main__":
    main()
