"""What produces every number of the README: floors, timing against peers, tuning, whole steps, cost and accuracy by drop rate, the report.

Run from the root: ``python -m bench`` for everything of this machine, or one part, ``python -m bench.run``. Not installed. A claim without a result line (``results.py``) does not appear, and only what is green is timed.
"""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # read with torch: the profiler that counts bytes on the CPU would print two lines a call
