"""Tests import the installed package, never the checkout's folders: the root's ``kernels`` must not be found as a top-level name."""

import sys
from pathlib import Path

_root = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if entry not in ("", _root)]
