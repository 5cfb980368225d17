"""Makes everything under tests/goldens that is not written by hand. See README.md.

usage: python tests/goldens/generate [--check] [PART ...]     PART = rows, models, quantised, folders, trainer, training, ranks,
schedules, generation, tokenizers, templates, trl, packers

--check makes the parts in a temporary folder and compares: texts exactly, floats to 1e-5.
"""

import importlib
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common  # sets the environment before anything of Hugging Face's is imported

# In the order in which they are made: each reads what those before it wrote.
PARTS = ["rows", "models", "quantised", "folders", "trainer", "training", "ranks", "schedules", "generation", "tokenizers", "templates", "trl", "packers"]


def same(a, b):
    if isinstance(a, float) or isinstance(b, float):
        return a == b or math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def content(path):
    """What a file holds, in a form that can be compared."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: [list(t.shape), str(t.dtype), t.flatten().tolist()] for name, t in load_file(path).items()}
    text = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.decode().splitlines()]
    return text


def differences(made, kept):
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        other = kept / path.relative_to(made)
        if not other.exists():
            yield f"{other} is missing"
        elif path.read_bytes() != other.read_bytes() and not same(content(path), content(other)):
            yield f"{other} differs"


def main():
    words = sys.argv[1:]
    check = "--check" in words
    parts = [part for part in PARTS if part in words] or PARTS
    kept = common.REPOSITORY / "tests/goldens"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if check else kept
        for part in PARTS:
            if part in parts:
                start = time.time()
                importlib.import_module(f"make_{part}").generate(root)
                print(f"{part}: {time.time() - start:.0f} s", flush=True)
            elif check:  # what a later part reads
                for folder in ("datasets", "models", "tokenizers"):
                    shutil.copytree(kept / folder, root / folder, dirs_exist_ok=True)
        found = list(differences(root, kept)) if check else []
    print("\n".join(found) or ("the same" if check else "written"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
