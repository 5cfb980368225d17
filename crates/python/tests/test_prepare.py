"""`suasion.prepare` gives, for rows from anywhere, what the program writes for the same rows in a file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import datasets
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import suasion


def large(table: pa.Table) -> pa.Table:
    """As polars has it: string views and large lists."""
    return table.cast(pa.schema([pa.field(f.name, pa.string_view() if f.type == pa.string() else f.type) for f in table.schema]))


def unaligned(table: pa.Table) -> pa.Table:
    """The same rows in batches of 7, with a slice that does not start at 0."""
    padded = pa.concat_tables([table.slice(0, 3), table])
    return pa.Table.from_batches(padded.slice(3).combine_chunks().to_batches(max_chunksize=7))


def torch_like(rows):
    class Rows:
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            return rows[i]

    return Rows()


INPUTS = {
    "list": lambda rows, path: rows,
    "iterator": lambda rows, path: iter(rows),
    "path": lambda rows, path: path / "rows.parquet",
    "table": lambda rows, path: pa.Table.from_pylist(rows),
    "views": lambda rows, path: large(pa.Table.from_pylist(rows)),
    "large": lambda rows, path: pa.Table.from_pylist(rows).cast(
        pa.schema([pa.field(f.name, pa.large_string()) for f in pa.Table.from_pylist(rows).schema])
    ),
    "slices": lambda rows, path: unaligned(pa.Table.from_pylist(rows)),
    "polars": lambda rows, path: polars.DataFrame(rows),
    "polars, shuffled and back": lambda rows, path: polars.DataFrame(rows).reverse()[::-1],
    "pandas": lambda rows, path: pandas.DataFrame(rows),
    "batch": lambda rows, path: pa.RecordBatch.from_pylist(rows),
    "reader": lambda rows, path: pa.Table.from_pylist(rows).to_reader(10),
    "dictionary": lambda rows, path: pa.Table.from_pylist(rows).set_column(
        0, "view", pa.array([r["view"] for r in rows]).dictionary_encode()
    ),
    "dataset": lambda rows, path: datasets.Dataset.from_list(rows),
    "shuffled and back": lambda rows, path: datasets.Dataset.from_list(rows[::-1]).select(range(len(rows))[::-1]),
    "formatted": lambda rows, path: datasets.Dataset.from_list(rows).with_format("numpy", columns=["input_text", "full_text"]),
    "transformed": lambda rows, path: datasets.Dataset.from_dict({"i": list(range(len(rows)))}).with_transform(
        lambda batch: {name: [rows[i][name] for i in batch["i"]] for name in ("input_text", "full_text")}
    ),
    "iterable": lambda rows, path: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "map-style": lambda rows, path: torch_like(rows),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_rows_from_anywhere_are_those_of_the_program(kind, rows, demo, prepared_by_program, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prepared = suasion.prepare(INPUTS[kind](rows, tmp_path), demo)
    assert len(prepared) == len(rows)
    assert list(prepared) == prepared_by_program
    assert prepared.to_arrow().to_pylist() == prepared_by_program
    assert prepared.to_datasets().to_list() == prepared_by_program


def test_the_order_is_that_of_the_indices(rows, demo, prepared_by_program):
    shuffled = datasets.Dataset.from_list(rows).add_column("n", list(range(len(rows)))).shuffle(seed=1).select(range(50))
    prepared = suasion.prepare(shuffled, demo)
    assert [row["input_ids"] for row in prepared] == [prepared_by_program[n]["input_ids"] for n in shuffled["n"]]


def test_the_fingerprint_is_that_of_what_rows_say(rows, demo):
    table = pa.Table.from_pylist(rows)
    same = [table, large(table), unaligned(table), datasets.Dataset.from_list(rows)]
    prints = {suasion.prepare(x, demo).manifest["fingerprint"] for x in same}
    assert len(prints) == 1
    other = suasion.prepare(table.slice(1), demo).manifest["fingerprint"]
    assert other not in prints


@pytest.mark.parametrize(
    "keys", [{"max_length": 500, "packing": True, "share_prefix": True}, {"max_length": 200, "truncation_mode": "drop"}]
)
def test_keys_are_those_of_the_command_line(keys, rows, demo, program, tmp_path):
    flags = [part for key, value in keys.items() for part in ("--set", f"{key}={str(value).lower()}")]
    out = tmp_path / "x.parquet"
    done = program("prepare", "--data", f"{demo}/rows.jsonl", "--model", demo, "-o", str(out), *flags)
    assert done.returncode == 0, done.stderr
    made = suasion.prepare(rows, demo, **keys)
    assert made.to_arrow().to_pylist() == pq.read_table(out).to_pylist()
    findings = [json.loads(line) for line in (tmp_path / "x.parquet.findings.jsonl").read_text().splitlines()]
    assert [finding._asdict() for finding in made.findings] == findings
    written = json.loads((tmp_path / "x.parquet.manifest.json").read_text())
    for name in ("policy", "counts", "tokenizer", "packs"):
        assert made.manifest.get(name) == written.get(name)


def test_rows_by_their_places(demo, rows):
    prepared = suasion.prepare(rows[:5], demo)
    assert [row["row"] for row in prepared[1:4]] == [1, 2, 3] and prepared[-1] == list(prepared)[4]
    for index, error in ((5, IndexError), (-6, IndexError), ("1", TypeError)):
        with pytest.raises(error):
            prepared[index]


def test_packs_and_weights_have_their_columns(demo, rows):
    weighted = suasion.prepare(rows, demo, prompt_loss_weight=0.5)
    assert weighted.column_names[-1] == "weights"
    assert set(weighted[0]["weights"]) == {0.0, 0.5, 1.0}
    # A row with weights after rows without any.
    tokens = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 3
    mixed = suasion.prepare([*tokens, {**tokens[0], "weights": [0.0, 0.5, 1.0]}, *tokens], demo)
    assert [row["weights"] for row in mixed] == [None, None, None, [0.0, 0.5, 1.0], None, None, None]


@pytest.mark.parametrize("width", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda item: pa.list_(item, 3)])
def test_lists_of_any_integers(width, kind, demo):
    ids = pa.array([[5, 6, 7]], kind(getattr(pa, width)()))
    labels = pa.array([[-100, 6, 7]], pa.list_(pa.int16()))
    prepared = suasion.prepare(pa.table({"input_ids": ids, "labels": labels}), demo)
    assert (prepared[0]["input_ids"], prepared[0]["labels"]) == ([5, 6, 7], [-100, 6, 7])


def test_trl_takes_it_as_it_is(rows, demo):
    features = suasion.prepare(rows, demo).to_datasets().features
    assert features["input_ids"] == datasets.List(datasets.Value("int32"))
    assert features["labels"] == datasets.List(datasets.Value("int64"))


def last_line_of(error: str) -> str:
    return error.split("error[", 1)[1].split("]: ", 1)[1]


def test_errors_have_the_text_of_the_command_line(rows, demo, program, tmp_path):
    bad = [rows[0], {"input_text": "a", "full_text": "b"}, {"nothing": 1}, rows[1]]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(bad), path)
    done = program("prepare", "--data", str(path), "--model", demo, "-o", str(tmp_path / "x.jsonl"))
    with pytest.raises(suasion.RowError) as error:
        suasion.prepare(path, demo)
    assert done.returncode == 3
    assert last_line_of(done.stderr).strip() == str(error.value)
    assert isinstance(error.value, ValueError) and error.value.tag == "E-ROW"
    kept = suasion.prepare(bad, demo, on_bad_row="skip")
    assert [row["row"] for row in kept] == [0, 3]
    assert [(f.row, f.level) for f in kept.findings if f.code == "E-ROW"] == [(1, "error"), (2, "error")]


@pytest.mark.parametrize(
    ("keys", "message", "help"),
    [
        ({"max_lenght": 5}, 'unknown key "max_lenght"', 'did you mean "max_length"?'),
        ({"max_length": "long"}, "max_length: expected", "for example max_length: 2048"),
        ({"learning_rate": 1e-4}, "learning_rate is not used here", "train"),
        ({"dataset_name": "x"}, "dataset_name is not a keyword here", "arguments of their own"),
        ({"share_prefix": True}, "share_prefix=true without packing=true", "set packing=true"),
        ({"packing_strategy": "wrapped"}, "packing_strategy", "bfd"),
    ],
)
def test_keywords_are_checked(keys, message, help, rows, demo):
    with pytest.raises(suasion.ConfigError) as error:
        suasion.prepare(rows, demo, **keys)
    assert message in error.value.message
    assert help in error.value.help


def test_what_has_no_rows_is_refused(demo, rows, tmp_path):
    for x in (None, 7, object(), {"prompt": ["a"]}, datasets.DatasetDict(train=datasets.Dataset.from_list(rows))):
        with pytest.raises(suasion.InputError):
            suasion.prepare(x, demo)
    with pytest.raises(suasion.SourceError, match="there are no rows"):
        suasion.prepare([], demo)
    with pytest.raises(suasion.SourceError, match="No such file"):
        suasion.prepare(tmp_path / "none.jsonl", demo)
    with pytest.raises(suasion.ModelError, match="no such folder"):
        suasion.prepare(rows, tmp_path / "none")
    with pytest.raises(suasion.ModelError, match="no tokenizer that can be used"):
        suasion.prepare(rows, object())


def test_rows_of_wrong_types(demo, rows):
    with pytest.raises(suasion.RowError, match="list: row 1: 'prompt' holds a set"):
        suasion.prepare([rows[0], {"prompt": {1}, "completion": "x"}], demo)
    with pytest.raises(suasion.RowError, match="row 1: the row is a string, not an object"):
        suasion.prepare([rows[0], "text"], demo)
    with pytest.raises(suasion.RowError, match="row 0: .*UTF-8"):
        suasion.prepare([{"prompt": "a\ud800", "completion": "x"}], demo)
    with pytest.raises(suasion.RowError, match="nothing"):
        suasion.prepare(pa.table({"nothing": [1]}), demo)


def test_batches_that_do_not_belong_together(demo, rows):
    tokens = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    # Each row says what it is: batches of other columns and rows of dictionaries may follow each other.
    mixed = suasion.prepare(iter([rows[0], tokens, rows[1]]), demo)
    assert [len(row["input_ids"]) for row in mixed][1] == 3
    batch, other = pa.RecordBatch.from_pylist(rows[:2]), pa.RecordBatch.from_pylist([tokens])
    whole = suasion.prepare([*rows[:2], tokens, rows[2]], demo)
    for x in ([batch, other, rows[2]], (part for part in (batch, other, rows[2]))):
        assert list(suasion.prepare(x, demo)) == list(whole)
    prints = {suasion.prepare([first, other], demo).manifest["fingerprint"] for first in (batch, batch.slice(1), other)}
    assert len(prints) == 3, "what comes before other columns counts"
    with pytest.raises(suasion.RowError, match="labels"):
        suasion.prepare(pa.table({"input_ids": [[5, 6]], "labels": ["none"]}), demo)
    with pytest.raises(suasion.RowError, match="input_ids"):
        suasion.prepare(pa.table({"input_ids": [[0.5, 6.0]], "labels": [[5, 6]]}), demo)
    with pytest.raises(suasion.RowError, match="row 1: .*input_ids"):
        suasion.prepare(pa.table({"input_ids": [[5, 6], None], "labels": [[5, 6], [5, 6]]}), demo)
    with pytest.raises(suasion.RowError, match="row 0: .*-5"):
        suasion.prepare(pa.table({"input_ids": [[-5, 6]], "labels": [[5, 6]]}), demo)


def test_an_iterators_exception_is_raised_again(demo, rows):
    class Gone(Exception):
        pass

    def some():
        yield from rows[:5]
        raise Gone("the disk was pulled")

    with pytest.raises(Gone, match="the disk was pulled"):
        suasion.prepare(some(), demo)

    def batches():
        yield pa.RecordBatch.from_pylist(rows[:5])
        raise Gone("in a stream")

    schema = pa.RecordBatch.from_pylist(rows[:5]).schema
    with pytest.raises(suasion.SourceError, match="in a stream"):
        suasion.prepare(pa.RecordBatchReader.from_batches(schema, batches()), demo)
    # The library goes on.
    assert len(suasion.prepare(rows[:5], demo)) == 5


def test_other_threads_run_meanwhile(demo, rows):
    beats = []
    done = threading.Event()

    def beat():
        while not done.is_set():
            beats.append(time.monotonic())
            time.sleep(0.001)

    table = pa.Table.from_pylist(rows * 60)
    thread = threading.Thread(target=beat)
    thread.start()
    start = time.monotonic()
    suasion.prepare(table, demo)
    end = time.monotonic()
    done.set()
    thread.join()
    during = [at for at in beats if start < at < end]
    assert len(during) > 5


ENDLESS = """
import sys, tempfile, suasion
def rows():
    print("begun", flush=True)
    while True:
        yield {"prompt": "[TASK] Say hello. [RESPONSE]", "completion": " Hello."}
try:
    suasion.prepare(rows(), sys.argv[1])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_it_can_be_stopped(how, demo, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, demo], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=tmp_path
    )
    assert child.stdout.readline() == "begun\n"
    time.sleep(0.3)
    child.send_signal(how)
    out, _ = child.communicate(timeout=30)
    assert out == ("interrupted\n" if how == signal.SIGINT else "")
    assert child.returncode == (0 if how == signal.SIGINT else -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_one_line_that_goes(demo, rows, capfd):
    def slowly():
        yield from rows * 2
        time.sleep(0.8)
        yield from rows[:1]

    suasion.prepare(slowly(), demo, progress=True)
    shown = capfd.readouterr().err
    assert "preparing  " in shown and " rows  " in shown and "tokens/s" in shown
    assert "\n" not in shown and shown.endswith("\r\x1b[2K")
    suasion.prepare(slowly(), demo)
    assert capfd.readouterr().err == ""


def test_paths_of_the_home_folder(demo, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    shutil.copytree(demo, tmp_path / "model")
    assert len(suasion.prepare("~/rows.jsonl", "~/model")) == 3


def test_a_forked_child_has_threads_of_its_own(demo, rows):
    # A child has none of the threads that its parent has started.
    before = list(suasion.prepare(rows[:20], demo))
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(1) as pool:
        job = pool.apply_async(_in_child, (rows[:20], demo))
        assert job.get(timeout=60) == before


def _in_child(rows, demo):
    return list(suasion.prepare(rows, demo))


def test_results_and_errors_cross_processes(demo):
    error = suasion.RowError("row 1: bad", "mend it", "E-ROW")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.tag) == (suasion.RowError, "row 1: bad\nhelp: mend it", "E-ROW")
