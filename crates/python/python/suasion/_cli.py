"""The program `suasion`, which is inside the extension module."""

from __future__ import annotations

import signal
import sys

from ._suasion import main as _main


def main() -> None:
    # The program has its own handling of Ctrl-C and of closed pipes.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_main(["suasion", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
