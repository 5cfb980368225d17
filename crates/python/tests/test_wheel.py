"""The program in the wheel, and the module's face."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import suasion


def test_the_program_is_on_the_path(program):
    script = Path(sysconfig.get_path("scripts")) / "suasion"
    said = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (0, f"suasion {suasion.__version__}\n")
    wrong = program("prepare", "--no-such-flag")
    assert wrong.returncode == 2 and "error[E-USAGE]" in wrong.stderr


def test_nothing_is_imported_that_was_not_handed_in():
    code = "import sys, suasion; suasion.verify([{'input_ids': [5, 6], 'labels': [-100, 6]}]); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.split()
    assert not {"pyarrow", "datasets", "transformers", "torch", "numpy"} & set(modules)


def test_everything_public_is_documented():
    for name in suasion.__all__:
        if name != "VerifyCallback":
            assert not callable(getattr(suasion, name)) or getattr(suasion, name).__doc__, name
    assert (Path(suasion.__file__).parent / "py.typed").exists()
