"""`suasion.verify` finds what the program finds, in objects of any kind."""

from __future__ import annotations

import json
import re

import datasets
import numpy as np
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
