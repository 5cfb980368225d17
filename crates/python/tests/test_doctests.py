"""The examples in docstrings, and those of docs/python.md."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["_prepare", "_preparer", "_verify"])
def test_examples_in_docstrings(name, demo):
    module = importlib.import_module(f"suasion.{name}")
    result = doctest.testmod(module, extraglobs={"DEMO": demo}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted > 0
