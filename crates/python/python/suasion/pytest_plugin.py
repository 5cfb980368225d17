"""The pytest plugin: a fixture that asserts masks, and prints the rows that are wrong, in colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def assert_masked(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``suasion.assert_masked``, whose rows are printed under the test that failed.

    Examples
    --------
    .. code-block:: python

        def test_masks(assert_masked):
            assert_masked(dataset, tokenizer, ignore=["T001"])
    """
    import suasion

    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    writer = getattr(reporter, "_tw", None)
    color = bool(getattr(writer, "hasmarkup", False))
    width = int(getattr(writer, "fullwidth", 100))

    def check(ds: Any, tokenizer: Any = None, ignore: Any = (), **keys: Any) -> Any:
        __tracebackhide__ = True
        report = suasion.verify(ds, tokenizer, ignore=ignore, progress=False, **keys)
        if not report.ok:
            rows = "\n".join(row.to_text(color=color, width=width) for row in report.rows())
            request.node.add_report_section("call", "suasion", rows)
            try:
                report.raise_for_errors()
            except suasion.FindingsError as error:
                pytest.fail(str(error), pytrace=False)
        return report

    return check
