"""What the parts of the generator share: where files go, and how numbers and lists are written."""

import json
import os
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    CUDA_VISIBLE_DEVICES="",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

REPOSITORY = Path(__file__).resolve().parents[3]
DEMO_ROWS = REPOSITORY / "examples/persuasion/rows.jsonl"
SEED = 1234


def demo_rows():
    """The demo's rows as (input_text, response) pairs."""
    rows = []
    for line in DEMO_ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["full_text"].startswith(row["input_text"])
        rows.append((row["input_text"], row["full_text"][len(row["input_text"]) :]))
    return rows


def _short(value):
    """Floats with nine significant digits, which tell any two f32 values apart; learning rates (f64) with all."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: item if key == "lrs" else _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return value


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path, value, short=False):
    """An object with one line per top-level key: readable diffs, small files."""
    value = _short(value) if short else value
    lines = [f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run_lengths(flags):
    """Run lengths of a list of booleans; the first run is of `False` (0 where the list starts with `True`)."""
    runs, current = [0], False
    for flag in flags:
        if bool(flag) != current:
            runs.append(0)
            current = bool(flag)
        runs[-1] += 1
    return runs
