"""What produces every number of the docs. Not installed: run ``python -m bench`` from the root.

A claim without a result line (``lines.py``) does not appear, and only what is green is timed.
"""

import os

# read with torch: the profiler that counts bytes on the CPU would print two lines a call
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
