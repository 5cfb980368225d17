"""`suasion.verify` finds what the program finds, in objects of any kind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import polars
import pyarrow as pa
import pytest
import suasion

GOOD = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
SHIFTED = {"input_ids": [12, 7, 31, 2], "labels": [-100, 31, 2, -100]}
PROMPT = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}


def batch(rows):
    width = max(len(row["input_ids"]) for row in rows) + 2
    pad = lambda values, value: np.array([list(v) + [value] * (width - len(v)) for v in values])  # noqa: E731
    return {
        "input_ids": pad([r["input_ids"] for r in rows], 0),
        "labels": pad([r["labels"] for r in rows], -100),
        "attention_mask": pad([[1] * len(r["input_ids"]) for r in rows], 0),
    }


INPUTS = {
    "list": lambda rows: rows,
    "table": pa.Table.from_pylist,
    "polars": polars.DataFrame,
    "dataset": datasets.Dataset.from_list,
    "indexed": lambda rows: datasets.Dataset.from_list(rows[::-1]).select(range(len(rows))[::-1]),
    "iterable": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "batch": batch,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_findings_in_any_kind_of_rows(kind):
    report = suasion.verify(INPUTS[kind]([GOOD, SHIFTED, GOOD]))
    assert not report.ok and not report
    assert [(f.row, f.code, f.level) for f in report.errors] == [(1, "L001", "error")]
    assert report.counts["L001"] == 1
    assert [t.supervised for t in report.row(1).tokens][:4] == [False, True, True, False]
    assert [t.id for t in report.row(2).tokens][:4] == GOOD["input_ids"]
    with pytest.raises(suasion.FindingsError, match=r"L001 .* row 1"):
        report.raise_for_errors()
    with pytest.raises((IndexError, suasion.SourceError)):
        report.row(3)
    suasion.verify(INPUTS[kind]([GOOD, GOOD]), ignore=["D001"]).raise_for_errors()


def test_it_says_what_the_program_says(demo, program, tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, SHIFTED, GOOD, {"input_ids": []}]))
    for data, model in [(str(path), []), (f"{demo}/rows.jsonl", ["--model", demo])]:
        said = json.loads(program("verify", "--data", data, "--json", *model).stdout)
        report = suasion.verify(data, *model[1:])
        assert report.counts == said["counts"]
        assert report.shares == {
            name: {"tokens": s["tokens"], "before": s["share_before"], "after": s["share_after"]}
            for name, s in said["sections"].items()
        }
        assert [f._asdict() for f in report.findings] == said["findings"]
        for name in ("rows", "tokens", "supervised_tokens", "trainable_rows"):
            assert report.summary[name] == said[name]
        shown = program("verify", "--data", data, "--row", "1", *model, "--color", "never").stdout
        assert report.row(1).to_text(width=80) in shown


def test_tokens_say_why(chat_model):
    row = suasion.explain(
        [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}], chat_model
    )
    by_origin = {}
    for token in row.tokens:
        by_origin.setdefault(token.origin, "")
        by_origin[token.origin] += token.text
    assert by_origin["response"] == "Hello."
    assert by_origin["end_of_turn"] == "<|endoftext|>"
    assert "Say hello." in by_origin["user"]
    assert row.learned == ["Hello.", "<|endoftext|>"]
    assert {t.reason for t in row.tokens if t.origin == "user"} == {"masked: prompt, section user"}
    assert all(t.weight == float(t.supervised) for t in row.tokens)
    same = suasion.verify([{"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]}], chat_model)
    assert str(same.row(0)) == str(row)
    assert "Say hello.assistant:\nHello." in re.sub("<[^>]*>", "", row._repr_html_())


def test_a_template_in_place_of_the_tokenizers(demo):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    report = suasion.verify([{"messages": messages}], demo, template)
    assert "".join(t.text for t in report.row(0).tokens) == "<user>Hi<|endoftext|><assistant>Yo<|endoftext|>"


def test_pages_are_whole(demo, rows):
    report = suasion.verify(rows[:5], demo)
    page = report.to_html(rows=[1])
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "http" not in page.split("<main>")[0].replace("http-equiv", "")
    assert "srcdoc" in report._repr_html_() and "<!DOCTYPE" not in report._repr_html_()


def test_sarif_is_that_of_the_program(program, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, SHIFTED, GOOD]))
    said = json.loads(program("verify", "--data", str(path), "--output-format", "sarif").stdout)
    log = suasion.verify(path).to_sarif()
    assert log == said and log["runs"][0]["results"][0]["ruleId"] == "L001"


def test_asserting(demo, rows):
    assert suasion.assert_masked(datasets.Dataset.from_list(rows[:10]), demo).ok
    with pytest.raises(AssertionError) as error:
        suasion.assert_masked([GOOD, SHIFTED])
    text = str(error.value)
    assert "L001" in text and "LEARNED" in text and "help: " in text
    assert suasion.assert_masked([GOOD, SHIFTED], ignore=["L001"]).ok
    with pytest.raises(suasion.InputError, match="no finding has the code"):
        suasion.assert_masked([GOOD], ignore=["X999"])


def test_prepared_rows_are_verified(demo, rows):
    report = suasion.verify(suasion.prepare(rows[:5], demo), demo)
    assert report.ok and len(report.row(4).tokens) > 100


def test_rows_that_cannot_be_looked_at(demo):
    report = suasion.verify(iter([GOOD]))
    with pytest.raises(suasion.InputError, match="cannot be read again"):
        report.row(0)
    with pytest.raises(suasion.SourceError, match="no tokenizer"):
        suasion.verify([{"prompt": "a", "completion": "b"}])
    with pytest.raises(suasion.InputError, match="no rows"):
        suasion.verify(3)
    with pytest.raises(suasion.RowError, match="labels"):
        suasion.verify([{"input_ids": [1, 2], "labels": [1]}]).row(0)


def test_batches_and_conversations_that_are_none():
    ids = np.array([[5, 6, 7], [5, 6, 7]])
    for labels in (np.array([[5, 6, 7]]), np.array([0, 1]), 3):
        with pytest.raises(suasion.InputError, match='"labels" does not have a row for each of the 2 of "input_ids"'):
            suasion.verify({"input_ids": ids, "labels": labels})
    with pytest.raises(suasion.InputError, match='without rows of "input_ids": it has labels'):
        suasion.verify({"labels": ids})
    with pytest.raises(suasion.InputError, match="a str is not a conversation"):
        suasion.explain("hello", "model")
    report = suasion.verify([GOOD])
    for number in (-1, 1):
        with pytest.raises(IndexError):
            report.row(number)
    with pytest.raises(TypeError):
        report.row("7")


def test_a_template_that_does_not_parse(demo):
    with pytest.raises(suasion.ModelError, match="^template: the chat template does not compile: "):
        suasion.verify([GOOD], demo, "{% for m in messages %}{{ m.content")


class Trainer:
    args = None

    def __init__(self, rows):
        self.train_dataset = datasets.Dataset.from_list(rows)


def test_a_trainer_without_masks_learns_everything():
    report = suasion.verify(Trainer([{"input_ids": [5, 6, 7, 8]}]))
    assert [t.supervised for t in report.row(0).tokens] == [True] * 4
    masked = suasion.verify(Trainer([{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}]))
    assert [t.supervised for t in masked.row(0).tokens] == [False, False, True, True]


def test_the_plugin_prints_the_rows(pytester):
    pytester.makepyfile(
        """
        GOOD = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
        SHIFTED = {"input_ids": [12, 7, 31, 2], "labels": [-100, 31, 2, -100]}

        def test_good(assert_masked):
            assert assert_masked([GOOD]).ok

        def test_bad(assert_masked):
            assert_masked([GOOD, SHIFTED])
        """
    )
    result = pytester.runpytest_subprocess("--color=yes")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*L001*row 1*", "*suasion*", "*LEARNED*", "*L001*error*"])
    assert "\x1b[" in result.stdout.str().split("suasion", 1)[1]


def test_what_a_model_gets_is_not_cut():
    long = {"input_ids": [5] * 2000, "labels": [-100] * 1000 + [5] * 1000}
    assert suasion.verify([long]).summary["cut"] == 1
    for x in (batch([long]), Trainer([long])):
        report = suasion.verify(x)
        assert (report.summary["cut"], len(report.row(0).tokens) // 1000) == (0, 2)
        assert suasion.verify(x, max_length=1500).summary["cut"] == 1


def foreign(rows, model):
    """Rows as another program leaves them: ids, and labels that teach all after the first quarter."""
    made = suasion.prepare(rows, model)
    late = lambda row: [-100] * (len(row["input_ids"]) // 4) + row["input_ids"][len(row["input_ids"]) // 4 :]  # noqa: E731
    return [{"input_ids": row["input_ids"], "labels": late(row)} for row in made]


SOURCES = {
    "list": lambda rows, path: rows,
    "iterator": lambda rows, path: iter(rows),
    "path": lambda rows, path: path,
    "dataset": lambda rows, path: datasets.Dataset.from_list(rows),
    "table": lambda rows, path: pa.Table.from_pylist(rows),
    "another order": lambda rows, path: rows[::-1],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_labels_are_held_against_the_source(kind, demo, rows, program, tmp_path):
    rows = rows[:20]
    source, made = tmp_path / "source.jsonl", tmp_path / "made.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.write_text("".join(json.dumps(row) + "\n" for row in foreign(rows, demo)))
    said = json.loads(program("verify", "--data", str(made), "--source", str(source), "--model", demo, "--json").stdout)
    report = suasion.verify(datasets.Dataset.from_list(foreign(rows, demo)), demo, source=SOURCES[kind](rows, source))
    assert [f._asdict() for f in report.findings] == said["findings"]
    assert report.shares["task"]["after"] == said["sections"]["task"]["share_after"]
    # What each token is, by its source row and not by its label.
    expected = suasion.prepare(rows, demo)[3]
    origins = {token.position: token.origin for token in report.row(3).tokens}
    for position, letter in enumerate(expected["origins"]):
        assert (origins[position] == "response") == (letter == "R")
    if kind == "list":
        assert "M004" not in suasion.verify(foreign(rows, demo), demo).counts
        assert "M004" in report.counts


def test_source_rows_that_cannot_be_read(demo, rows):
    made = foreign(rows[:5], demo)

    class Gone(Exception):
        pass

    class Rows:
        def __iter__(self):
            yield rows[0]
            raise Gone("in the source")

    with pytest.raises(Gone, match="in the source"):
        suasion.verify(made, demo, source=Rows())
    with pytest.raises(suasion.InputError, match="source: a RecordBatchReader can be read once"):
        suasion.verify(made, demo, source=pa.Table.from_pylist(rows[:5]).to_reader())
    with pytest.raises(suasion.InputError, match="int: no rows"):
        suasion.verify(made, demo, source=3)
    with pytest.raises(suasion.SourceError, match="no tokenizer"):
        suasion.verify(made, source=rows[:5])


def test_findings_that_are_allowed():
    report = suasion.verify([GOOD, SHIFTED], allow_findings=["L001"])
    assert report.ok and report.counts["L001"] == 1 and report.errors == []
    assert [f.code for f in report.findings if f.level == "error"] == ["L001"]
    report.raise_for_errors()
    assert suasion.assert_masked([GOOD, SHIFTED], allow_findings=["L001"]).ok
    # A code as text is one code, as on the command line.
    assert suasion.verify([GOOD, SHIFTED], ignore="L001,D001").counts == {}
    assert suasion.verify([GOOD, GOOD, SHIFTED], select="L").counts == {"L001": 1}
    with pytest.raises(suasion.InputError, match="ignore: a int, not a code"):
        suasion.verify([GOOD], ignore=[1])


def test_a_row_is_looked_at_as_it_was_verified():
    report = suasion.verify([GOOD, SHIFTED], ignore=["L001"])
    assert [f.code for f in report.row(1).findings] == []
    assert [f.code for f in suasion.verify([GOOD, SHIFTED]).row(1).findings] == ["L001"]


def test_a_trainer_whose_collator_makes_the_tokens():
    with pytest.raises(suasion.InputError, match="no input_ids, but messages: its collator makes tokens"):
        suasion.verify(Trainer([{"messages": [{"role": "user", "content": "Hi"}]}]))


ENDLESS = """
import sys, suasion
class Rows:
    def __iter__(self):
        print("begun", flush=True)
        while True:
            yield {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
class Source:
    def __iter__(self):
        print("begun", flush=True)
        while True:
            yield {"prompt": "[TASK] Say hello. [RESPONSE]", "completion": " Hello."}
try:
    if sys.argv[2] == "rows":
        suasion.verify(Rows())
    else:
        suasion.verify([{"input_ids": [5, 6], "labels": [5, 6]}], sys.argv[1], source=Source())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("which", ["rows", "source"])
def test_it_can_be_stopped(which, demo, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, demo, which],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=tmp_path,
    )
    assert child.stdout.readline() == "begun\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert (out, child.returncode) == ("interrupted\n", 0)
    assert list(tmp_path.iterdir()) == []
