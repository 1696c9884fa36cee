"""Kill a real training run at random moments, and compare it with one that nobody disturbs.

    python tests/training/kill_often.py --kills 20

Each start is `vatt-fast pretrain` with a worker, in a process group that gets SIGKILL after a
random time, also amid imports and saves; the next start continues. In the end every weight and
every logged loss must be those of the undisturbed run, and no file may be left over. Prints one
JSON line, and ends with status 1 where something differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from safetensors.torch import load_file
from training_runs import metrics, write_media

from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.metrics import METRICS

STEPS = 400


def start(folder: Path, out: Path) -> subprocess.Popen:
    options = dict(data=folder, out=out, steps=STEPS, batch_size=4, warmup_steps=10, log_every=1)
    options |= dict(checkpoint_every=10, workers=1, precision="fp32", keep_last=2)
    # small clips: most of the time goes into steps and saves, where the kills should fall
    options |= dict(frames=4, height=16, width=16, samples=1280)
    command = [sys.executable, "-m", "vatt_fast.cli", "pretrain"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}:\n{errors.decode()}")


def wait_for_lines(process: subprocess.Popen, path: Path, more: int) -> None:
    """Until ``more`` steps and one are logged beyond those of the start."""

    def count() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    goal = count() + more + 1
    while process.poll() is None and count() < goal:
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "media").mkdir()
        folder, whole, killed = write_media(root / "media"), root / "whole", root / "killed"
        finish(start(folder, whole))
        kills, seen = 0, []
        while kills < given.kills:
            process = start(folder, killed)
            if draw.random() < 0.2:  # amid the imports
                time.sleep(draw.uniform(0.0, 4.0))
            else:
                wait_for_lines(process, killed / METRICS, draw.randrange(STEPS // given.kills))
                time.sleep(draw.uniform(0.0, 0.2))
            if process.poll() is not None:
                finish(process)
                break  # done before its next kill
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            standing = killed / CHECKPOINT
            seen.append(read_standing(standing).step if standing.exists() else 0)
        finish(start(folder, killed))
        a, b = load_file(whole / CHECKPOINT), load_file(killed / CHECKPOINT)
        losses = [[line["loss"] for line in metrics(out)] for out in (whole, killed)]
        names = [sorted(path.name for path in out.iterdir()) for out in (whole, killed)]
        found = {
            "kills": kills,
            "steps_at_kills": seen,
            "weights_equal": a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a),
            "losses_equal": losses[0] == losses[1],
            # TensorBoard begins a file a start
            "left_over": [n for n in names[1] if n not in names[0] and "tfevents" not in n],
        }
        print(json.dumps(found))
        if not (found["weights_equal"] and found["losses_equal"]) or found["left_over"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
