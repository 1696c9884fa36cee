"""Kill ranks of a run under torchrun at random moments, and compare it with an undisturbed one.

    python tests/training/kill_ranks_often.py --kills 20

torchrun starts all ranks again (--max-restarts) and they continue from the checkpoint. Every third
kill waits until rank 0 is writing a file; the others fall at random, amid imports and joining too.
In the end every weight and every logged loss must be those of the undisturbed run, and no file may
be left over. Prints one JSON line, and ends with status 1 where something differs.
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
from torchrun import environment, free_port, pid_of, pretrain_command
from training_runs import metrics, write_media

from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.shards import newest


def launch(folder: Path, out: Path, given: argparse.Namespace) -> subprocess.Popen:
    options = dict(steps=given.steps, checkpoint_every=5, workers=1, keep_last=2)
    options |= dict(strategy=given.strategy)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(given.ranks)]
    start += ["--max-restarts", str(given.kills + 5), "--master-port", str(free_port()), "-m"]
    return subprocess.Popen(
        start + pretrain_command(folder, out, **options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}:\n{errors.decode()}")


def saving(out: Path) -> list[str]:
    try:
        return [path.name for path in out.glob(".*.part")]
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "media").mkdir()
        folder, whole, killed = write_media(root / "media"), root / "whole", root / "killed"
        finish(launch(folder, whole, given))
        process = launch(folder, killed, given)
        # read meanwhile, or the launcher would wait for us
        errors = (root / "errors").open("wb")
        reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=errors)
        kills: list[dict] = []
        while len(kills) < given.kills:
            wanted = len(kills) % 3 == 2  # while a file is written, one of the next 30
            files, passing = set(), draw.randrange(30)
            until = time.monotonic() + (60 if wanted else draw.uniform(0.0, 18.0))
            while process.poll() is None and time.monotonic() < until:
                files |= {*saving(killed)} if wanted else set()
                if len(files) > passing and saving(killed):
                    break
                time.sleep(0.0005 if wanted else 0.01)
            rank = 0 if wanted else draw.randrange(given.ranks)
            pid = pid_of(process.pid, rank)
            if process.poll() is not None:
                break
            if pid is None:  # torchrun is between two starts
                time.sleep(0.2)
                continue
            amid = saving(killed)
            os.kill(pid, signal.SIGKILL)
            standing = newest(killed)
            step = read_standing(standing).step if standing.exists() else 0
            kills.append(dict(rank=rank, after_step=step, amid=[n.split(".safe")[0] for n in amid]))
            while pid_of(process.pid, rank) == pid and process.poll() is None:
                time.sleep(0.01)
        process.wait()
        reader.wait()
        errors.close()
        if process.returncode:
            told = (root / "errors").read_text()
            raise SystemExit(f"torchrun ended with {process.returncode}:\n{told[-5000:]}")
        a, b = load_file(whole / CHECKPOINT), load_file(killed / CHECKPOINT)
        losses = [[line["loss"] for line in metrics(out)] for out in (whole, killed)]
        names = [sorted(path.name for path in out.iterdir()) for out in (whole, killed)]
        found = {
            "kills": len(kills),
            "amid a save": sum(bool(one["amid"]) for one in kills),
            "ranks": [one["rank"] for one in kills],
            "after_steps": [one["after_step"] for one in kills],
            "weights_equal": a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a),
            "losses_equal": losses[0] == losses[1],
            "left_over": [name for name in names[1] if name not in names[0]],
        }
        print(json.dumps(found))
        if not (found["weights_equal"] and found["losses_equal"]) or found["left_over"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
