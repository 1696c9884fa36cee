"""Read two batches of the paper's size, and watch what memory they take.

    python tests/data/large_batch.py --clips 2048 --workers 2

Workers read clips of base_base_small, half of whose patches are dropped, as pre-training does. All
processes together (what they share counted once) may hold 5 % more than two batches. Prints one
JSON line, and ends with status 1 where they hold more or a clip is missing.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from media_files import encode
from processes import memory_of_group

from vatt_fast.config import preset
from vatt_fast.data.clips import ClipSpec, DropToken
from vatt_fast.data.dataset import ClipDataset
from vatt_fast.data.loader import loader

FILES, BATCHES = 64, 2
MOST = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2048, help="of a batch")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    os.setpgid(0, 0)
    config = preset("base_base_small")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            path = Path(folder) / f"{number:02d}.mp4"
            encode(path, video="libx264", audio="aac", seconds=5.0, fps=10, rate=48000)
        dataset = ClipDataset(
            folder,
            ClipSpec.from_config(config),
            vocabulary=None,
            batch_size=given.clips,
            drop_token=DropToken(config, 0.5),
        )
        before, peak, over = memory_of_group(os.getpid()), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.5):
                peak = max(peak, memory_of_group(os.getpid()))

        watching = threading.Thread(target=watch)
        watching.start()
        began, seconds, valid = time.monotonic(), [], 0
        for batch in loader(dataset, 0, BATCHES, workers=given.workers):
            seconds.append(round(time.monotonic() - began, 1))
            valid += int(batch.video_valid.sum())
        over.set()
        watching.join()
        found = {
            "clips": given.clips,
            "workers": given.workers,
            "batch_gb": round(dataset.batch_bytes / 1e9, 2),
            "before_gb": round(before / 1e9, 2),
            "peak_gb": round(peak / 1e9, 2),
            "batches_after_seconds": seconds,
            "valid": valid,
        }
        print(json.dumps(found))
        if peak - before > MOST * BATCHES * dataset.batch_bytes or valid != BATCHES * given.clips:
            raise SystemExit("something is otherwise")


if __name__ == "__main__":
    main()
