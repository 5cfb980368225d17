"""What the tests share: the demo's rows and model, and a model with a chat template."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples" / "persuasion"

#: Marks turns by tokens of the demo's vocabulary: its end of text.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def demo() -> str:
    return str(DEMO)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chat")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def run(*args: str, **options) -> subprocess.CompletedProcess:
    """Runs the program."""
    command = [sys.executable, "-m", "suasion", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="session")
def program():
    return run


@pytest.fixture(scope="session")
def prepared_by_program(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What `suasion prepare` writes for the demo's rows."""
    out = tmp_path_factory.mktemp("out") / "rows.jsonl"
    done = run("prepare", "--data", str(DEMO / "rows.jsonl"), "--model", str(DEMO), "-o", str(out))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]
