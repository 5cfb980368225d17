"""`suasion.Preparer`: the same rows as the program, batch by batch."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile

import datasets
import pyarrow as pa
import pytest
import suasion


@pytest.fixture
def table(rows):
    table = pa.Table.from_pylist(rows)
    return table.append_column("n", pa.array(range(len(rows)), pa.int32()))


def same(prepared: list[dict], expected: list[dict], id: str = "n") -> None:
    assert [row[id] for row in prepared] == [row["row"] for row in expected]
    for name in ("input_ids", "labels", "origins"):
        assert [row[name] for row in prepared] == [row[name] for row in expected]


def test_batches_are_those_of_the_program(table, demo, prepared_by_program):
    f = pickle.loads(pickle.dumps(suasion.Preparer(demo, id="n")))
    whole = f(table)
    assert isinstance(whole, pa.Table) and whole.schema == f.schema
    same(whole.to_pylist(), prepared_by_program)
    batches = list(f(iter(table.to_batches(max_chunksize=50))))
    assert all(isinstance(batch, pa.RecordBatch) and batch.schema == f.schema for batch in batches)
    same(pa.Table.from_batches(batches).to_pylist(), prepared_by_program)
    columns = f(table.to_pydict())
    assert isinstance(columns, dict)
    same(pa.table(columns).to_pylist(), prepared_by_program)


def test_datasets_map(table, demo, prepared_by_program):
    f = suasion.Preparer(demo, id="n")
    rows = datasets.Dataset(table)
    for source in (rows, rows.with_format("arrow")):
        mapped = source.map(f, batched=True, batch_size=40, remove_columns=rows.column_names, load_from_cache_file=False)
        same(mapped.with_format(None).to_list(), prepared_by_program)
    two = rows.map(f, batched=True, batch_size=40, remove_columns=rows.column_names, num_proc=2, load_from_cache_file=False)
    same(two.to_list(), prepared_by_program)


def test_the_schema_is_known_before(demo):
    f = suasion.Preparer(demo, id="key", id_type="string", prompt_loss_weight=0.5, with_text=True)
    assert f.schema.names == ["key", "input_ids", "labels", "origins", "weights", "text"]
    assert f.spark_schema == (
        "`key` string, `input_ids` array<int>, `labels` array<bigint>, `origins` string, `weights` array<float>, `text` string"
    )
    row = {"key": "a", "prompt": "[TASK] Hi [RESPONSE]", "completion": " Yo"}
    made = f(pa.table({name: [value] for name, value in row.items()}))
    assert made.schema == f.schema and made["text"][0].as_py().startswith("[TASK] Hi [RESPONSE] Yo")
    empty = f(pa.table({name: [value] for name, value in row.items()}).slice(0, 0))
    assert empty.num_rows == 0 and empty.schema == f.schema


def test_bad_rows_are_named_by_their_id(demo, table):
    bad = table.slice(5, 3).set_column(
        table.schema.get_field_index("full_text"), "full_text", pa.array(["no", table["full_text"][6].as_py(), None])
    )
    with pytest.raises(suasion.RowError, match="batch: row 5: .*\n.*row 7"):
        suasion.Preparer(demo, id="n")(bad)
    kept = suasion.Preparer(demo, id="n", on_bad_row="skip")(bad)
    assert kept["n"].to_pylist() == [6]


def test_what_a_batch_cannot_do_is_refused(demo, table):
    with pytest.raises(suasion.InputError, match="packing=true"):
        suasion.Preparer(demo, packing=True)
    with pytest.raises(suasion.ConfigError, match='unknown key "max_lenght"'):
        suasion.Preparer(demo, max_lenght=3)
    with pytest.raises(suasion.InputError, match="there is no column 'key'|there is no column \"key\""):
        suasion.Preparer(demo, id="key")(table)
    with pytest.raises(suasion.InputError, match="rows are identified by integers"):
        suasion.Preparer(demo, id="view")(table)
    with pytest.raises(suasion.InputError, match="is the name of a prepared column"):
        suasion.Preparer(demo, id="labels")
    with pytest.raises(suasion.InputError, match="is not a batch"):
        suasion.Preparer(demo)([1, 2])
    with pytest.raises(suasion.ModelError, match="no such folder"):
        suasion.Preparer("/nowhere/at/all")


def dies(batch, f):
    if 90 in batch["n"].to_pylist():
        os.kill(os.getpid(), signal.SIGKILL)
    return f(batch)


def test_workers_that_fail_and_workers_that_are_killed(demo, table, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    f = suasion.Preparer(demo, id="n")
    rows = datasets.Dataset(table).with_format("arrow")
    options = {"batched": True, "batch_size": 40, "remove_columns": table.column_names, "num_proc": 2, "load_from_cache_file": False}
    with pytest.raises(RuntimeError, match="died"):
        rows.map(dies, fn_kwargs={"f": f}, **options)
    texts = table["full_text"].to_pylist()
    texts[90] = "other"
    bad = table.set_column(table.schema.get_field_index("full_text"), "full_text", pa.array(texts))
    with pytest.raises(suasion.RowError, match="batch: row 90: ") as error:
        datasets.Dataset(bad).with_format("arrow").map(f, **options)
    assert error.value.tag == "E-ROW" and error.value.help
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("suasion")] == []
    assert rows.map(f, **options).num_rows == table.num_rows


def test_every_type_that_names_rows(demo, table):
    names = table["n"].to_pylist()
    for kind in (pa.int8(), pa.uint16(), pa.uint64(), pa.int64()):
        some = table.slice(0, 100).set_column(table.schema.get_field_index("n"), "n", pa.array(names[:100], kind))
        assert suasion.Preparer(demo, id="n")(some)["n"].to_pylist() == names[:100]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        ids = pa.array([str(n) for n in names], pa.string()).cast(kind)
        made = suasion.Preparer(demo, id="n", id_type="string")(table.set_column(table.schema.get_field_index("n"), "n", ids))
        assert made["n"].to_pylist() == [str(n) for n in names]
