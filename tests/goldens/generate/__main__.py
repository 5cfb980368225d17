"""Makes everything under tests/goldens. See README.md.

usage: python tests/goldens/generate [--check] [PART ...]      PART = models, folders, rows, tokenizers
"""

import importlib
import sys
import time
from pathlib import Path

import common  # noqa: F401  (sets the environment before anything of Hugging Face's is imported)

PARTS = ["models", "folders", "rows", "tokenizers"]


def main():
    parts = [word for word in sys.argv[1:] if not word.startswith("-")] or PARTS
    root = common.REPOSITORY / "tests/goldens"
    for part in parts:
        start = time.time()
        importlib.import_module(f"make_{part}").generate(root)
        print(f"{part}: {time.time() - start:.0f} s")


main()
