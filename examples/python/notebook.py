#!/usr/bin/env python3
"""Executes masks.ipynb and writes its outputs into it: `python examples/python/notebook.py` (needs nbclient, ipykernel)."""

import pathlib

import nbformat
from nbclient import NotebookClient

path = pathlib.Path(__file__).with_name("masks.ipynb")
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
for cell in notebook.cells:
    # When it ran is no news.
    cell.metadata.pop("execution", None)
nbformat.write(notebook, path)
