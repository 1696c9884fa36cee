"""Train for half an hour on a folder with broken files, and watch what piles up.

    python tests/training/soak.py --minutes 30

`vatt-fast pretrain` with two workers runs over 200 files of ten containers, two of them broken, and
is then stopped by SIGTERM. Its memory (all processes together, what they share counted once) in the
last quarter of the time may be 5 % above that of the second; it must have listed the broken files
and no other, never stood still for long, and saved its last step. Prints one JSON line, and ends
with status 1 where something is otherwise.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
from media_files import encode
from processes import memory_of_group
from training_runs import metrics

from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.metrics import METRICS

FILES, BROKEN = 200, 2
FLAT = 1.05
STILL_SECONDS = 60  # machines may be busy; a worker that hangs stands still for ever
KINDS = {
    ".mp4": ("libx264", "aac"),
    ".mov": ("mpeg4", "aac"),
    ".mkv": ("libx264", "libopus"),
    ".webm": ("libvpx", "libopus"),
    ".avi": ("mpeg4", "mp3"),
    ".mpg": ("mpeg2video", "mp2"),
    ".ts": ("libx264", "aac"),
    ".wav": (None, "pcm_s16le"),
    ".flac": (None, "flac"),
    ".mp3": (None, "mp3"),
}


def write_folder(folder: Path) -> list[str]:
    """Files of every kind with captions; returns the names of the broken ones."""
    captions = {}
    kinds = itertools.cycle(KINDS.items())
    for number, (suffix, (video, audio)) in zip(range(FILES), kinds, strict=False):
        path = folder / f"{number:03d}{suffix}"
        fps = 25 if suffix == ".mpg" else 10
        encode(path, video=video, audio=audio, seconds=2.0, fps=fps, rate=48000)
        captions[path.name] = [{"start": 0.0, "end": 2.0, "text": f"this is clip {number}"}]
    (folder / "captions.json").write_text(json.dumps(captions))
    cut, nonsense = folder / "040.mp4", folder / "141.mov"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    nonsense.write_bytes(np.random.default_rng(0).bytes(nonsense.stat().st_size))
    return [cut.name, nonsense.name]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        (folder := Path(place) / "media").mkdir()
        out = Path(place) / "run"
        broken = write_folder(folder)
        options = dict(data=folder, out=out, steps=10**6, batch_size=8, warmup_steps=10)
        options |= dict(frames=8, height=32, width=32, samples=12800, workers=2, log_every=1)
        command = [sys.executable, "-m", "vatt_fast.cli", "pretrain", "--checkpoint-every", "500"]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        began, held, lines, still, last = time.monotonic(), [], 0, 0.0, time.monotonic()
        while process.poll() is None and time.monotonic() - began < 60 * given.minutes:
            time.sleep(1)
            now = len((out / METRICS).read_text().splitlines()) if (out / METRICS).exists() else 0
            if now > lines:
                lines, last = now, time.monotonic()
            still = max(still, time.monotonic() - last)
            held.append(memory_of_group(process.pid))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate()[1].decode()
        quarter = len(held) // 4
        early = statistics.mean(held[quarter : 2 * quarter])
        late = statistics.mean(held[3 * quarter :])
        logged = metrics(out)
        found = {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "steps": logged[-1]["step"],
            "clips": logged[-1]["step"] * options["batch_size"],
            "early_mb": round(early / 1e6, 1),
            "late_mb": round(late / 1e6, 1),
            "growth": round(late / early, 4),
            "skipped": logged[-1]["skipped_files"],
            "broken": len(broken),
            "longest_still_seconds": round(still, 1),
            "ended_with": process.returncode,
            "saved_step": read_standing(out / CHECKPOINT).step,
        }
        print(json.dumps(found))
        good = found["growth"] <= FLAT and found["skipped"] == found["broken"]
        good &= found["ended_with"] == 130 and found["saved_step"] == found["steps"]
        good &= [line["step"] for line in logged] == list(range(1, found["steps"] + 1))
        if not (good and still < STILL_SECONDS):
            raise SystemExit(f"something is otherwise:\n{errors}")


if __name__ == "__main__":
    main()
