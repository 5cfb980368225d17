"""Progress: one updating line in a terminal or under a notebook's cell; nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Iterator

#: Work that is shorter shows nothing.
_PATIENCE = 0.5


class _Line:
    def __init__(self, what: str, total: int | None, display: Any) -> None:
        self.what, self.total, self.display = what, total, display
        self.started = time.monotonic()
        self.shown = False
        self.handle: Any = None

    def __call__(self, rows: int, tokens: int, read: int, size: int) -> None:
        if time.monotonic() - self.started < _PATIENCE or rows == 0:
            return
        share = read / size if size else rows / self.total if self.total else None
        done = "" if share is None else f"{min(share, 1.0):4.0%}  "
        seconds = time.monotonic() - self.started
        line = f"{self.what}  {done}{rows:,} rows  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s"
        self.shown = True
        if self.display is None:
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
        elif self.handle is None:
            self.handle = self.display({"text/plain": line}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": line}, raw=True)

    def end(self) -> None:
        if self.shown and self.display is None:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def _notebook() -> Any:
    """The function that shows objects under a cell, in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or "IPKernelApp" not in getattr(shell, "config", {}):
        return None
    from IPython.display import display

    return display


@contextmanager
def progress(
    what: str, total: int | None, wanted: bool | None
) -> Iterator[Callable[[int, int, int, int], None] | None]:
    """A callback that shows progress; ``None`` where nothing is to be shown."""
    display = _notebook()
    if wanted is False or (wanted is None and display is None and not sys.stderr.isatty()):
        yield None
        return
    line = _Line(what, total, display)
    try:
        yield line
    finally:
        line.end()
