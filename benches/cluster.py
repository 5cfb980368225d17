#!/usr/bin/env python3
"""suasion.Preparer on four engines: the digest of the prepared rows and the time, beside `suasion prepare`.

    benches/cluster.py --data rows.jsonl --model MODEL [--copies 8] [--engines program,datasets,ray,spark,daft]

It needs `pip install suasion datasets ray pyspark daft` in one environment, and Java for Spark. The rows are copied
`--copies` times and numbered; each engine reads them from the same Parquet files. The digest is SHA-256 over ids,
input_ids, labels and origins in the order of the ids. Each engine prepares the rows twice: the second run, in the
session of the first, is what it costs beside starting. Exit status 1 where two digests differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import suasion

#: Files, and so tasks, that the rows are divided into.
FILES = 8


def digest(table: pa.Table, id: str = "n") -> str:
    table = table.take(pc.sort_indices(table, [(id, "ascending")]))
    sha = hashlib.sha256()
    types = {id: pa.int64(), "input_ids": pa.large_list(pa.int32()), "labels": pa.large_list(pa.int64()), "origins": pa.large_string()}
    for name, kind in types.items():
        column = table[name].cast(kind).combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_large_list(kind):
            sha.update(pc.list_value_length(column).to_numpy().tobytes())
            column = column.flatten()
        if pa.types.is_large_string(kind):
            sha.update("\n".join(column.to_pylist()).encode())
        else:
            sha.update(column.to_numpy().tobytes())
    return sha.hexdigest()[:16]


def twice(run):
    """Runs twice: the second time the session and its workers are there, with their tokenizers."""
    run()
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def program(folder, model, keys, workers):
    out = folder / "program.parquet"
    flags = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "suasion", "prepare", "--data", f"{folder}/rows/*.parquet", "--model", model, "-o", str(out)]

    def run():
        done = subprocess.run([*command, "--rebuild", "--threads", str(workers), *flags], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)

    _, seconds = twice(run)
    table = pq.read_table(out)
    return table.rename_columns(["n" if name == "row" else name for name in table.column_names]), seconds


def with_datasets(folder, model, keys, workers):
    import datasets

    datasets.disable_progress_bars()
    f = suasion.Preparer(model, id="n", **keys)
    rows = datasets.Dataset.from_parquet(f"{folder}/rows/*.parquet", cache_dir=str(folder / "cache"))
    rows = rows.with_format("arrow")
    options = {"batched": True, "remove_columns": rows.column_names, "num_proc": workers, "load_from_cache_file": False}
    return twice(lambda: rows.map(f, **options).with_format("arrow")[:])


def with_ray(folder, model, keys, workers):
    # Ray gives its workers the niceness 15, so that other work on the machine starves them.
    os.environ["RAY_worker_niceness"] = "0"
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        f = suasion.Preparer(model, id="n", **keys)

        def run():
            rows = ray.data.read_parquet(f"{folder}/rows")
            return pa.concat_tables(ray.get(rows.map_batches(f, batch_format="pyarrow", batch_size=None).to_arrow_refs()))

        return twice(run)
    finally:
        ray.shutdown()


def with_spark(folder, model, keys, workers):
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    session = SparkSession.builder.master(f"local[{workers}]").config("spark.ui.enabled", "false")
    # gzip is Java's own; Spark's library for snappy takes a machine that has musl beside glibc for a musl one.
    session = session.config("spark.sql.parquet.compression.codec", "gzip")
    spark = session.config("spark.log.level", "ERROR").config("spark.driver.memory", "2g").getOrCreate()
    try:
        f = suasion.Preparer(model, id="n", **keys)
        out = str(folder / "spark.parquet")

        def run():
            rows = spark.read.parquet(f"{folder}/rows").mapInArrow(f, f.spark_schema)
            rows.write.mode("overwrite").parquet(out)

        _, seconds = twice(run)
        return pq.read_table(out), seconds
    finally:
        spark.stop()


def with_daft(folder, model, keys, workers):
    import daft

    f = suasion.Preparer(model, id="n", **keys)
    kinds = {field.name: daft.DataType.from_arrow_type(field.type) for field in f.schema}
    columns = ["n", "prompt", "completion"]

    @daft.func.batch(return_dtype=daft.DataType.struct(kinds))
    def prepared(n: daft.Series, prompt: daft.Series, completion: daft.Series):
        table = pa.table({name: s.to_arrow() for name, s in zip(columns, (n, prompt, completion))})
        return daft.Series.from_arrow(f(table).to_struct_array().combine_chunks())

    def run():
        rows = daft.read_parquet(f"{folder}/rows/*.parquet")
        frame = rows.select(prepared(*(daft.col(name) for name in columns)).alias("row"))
        return frame.select(*(daft.col("row").get(name).alias(name) for name in kinds)).to_arrow()

    return twice(run)


ENGINES = {"program": program, "datasets": with_datasets, "ray": with_ray, "spark": with_spark, "daft": with_daft}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON Lines with prompt and completion")
    parser.add_argument("--model", required=True)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    model = os.path.abspath(args.model)
    keys = {"max_length": args.max_length}
    lines = [json.loads(line) for line in open(args.data)]
    # Copies differ, so that no one's cache of whole rows helps.
    rows = [
        {"prompt": f"{copy}: {line['prompt']}", "completion": line["completion"]}
        for copy in range(args.copies)
        for line in lines
    ]
    table = pa.Table.from_pylist(rows)
    table = table.append_column("n", pa.array(range(len(rows)), pa.int64()))
    digests = set()
    with tempfile.TemporaryDirectory(prefix="suasion-cluster-") as name:
        folder = pathlib.Path(name)
        (folder / "rows").mkdir()
        size = -(-len(rows) // FILES)
        for i in range(FILES):
            pq.write_table(table.slice(i * size, size), folder / "rows" / f"{i:05}.parquet", compression="gzip")
        print(f"{len(rows):,} rows, {sum(f.stat().st_size for f in (folder / 'rows').iterdir()) / 1e6:.1f} MB of Parquet")
        print("| engine | workers | digest | first run, with starting (s) | again (s) |\n|---|---|---|---|---|")
        for engine in args.engines.split(","):
            for workers in (1, 2) if engine in ("program", "datasets", "ray") else (2,):
                start = time.perf_counter()
                made, again = ENGINES[engine](folder, model, keys, workers)
                first = time.perf_counter() - start - again
                digests.add(digest(made))
                print(f"| {engine} | {workers} | `{digest(made)}` | {first:.1f} | {again:.1f} |", flush=True)
    return 0 if len(digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
