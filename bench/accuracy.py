"""``python -m bench.accuracy``: what a drop rate costs in accuracy: the demo's world, pre-trained at four drop rates with three seeds each.

Table 5 of the paper in miniature: the same steps and batches at every rate, retrieval and a linear probe of the frozen video features on
held-out clips, all tokens kept when measuring. A seed has a world, weights and draws of its own. 1200 rendered clips of three seconds are
no Kinetics: the order of the rates is worth reading, the percentages are this world's.

Takes about 90 minutes on 2 cores; may be killed at any time and continues with the same command. Runs that the results hold are not repeated.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from vatt_fast.config import preset
from vatt_fast.demo.run import DemoConfig, run_demo

from . import machine
from .floors import step_flops

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy.jsonl"
DROP_RATES, SEEDS = (0.75, 0.5, 0.25, 0.0), (0, 1, 2)
MEASURES = {
    "t2v_r10": "text to video R@10",
    "t2v_r1": "text to video R@1",
    "a2v_r10": "audio to video R@10",
    "motion_probe": "linear probe of 8 motions",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One pre-training and its evaluation; rates in percent, ``before`` of the same model untrained."""

    drop_rate: float
    seed: int
    steps: int
    t2v_r1: float
    t2v_r10: float
    a2v_r10: float
    motion_probe: float
    t2v_r10_before: float
    motion_probe_before: float
    train_gflops: float  # of one clip: three times the forward pass
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    clips: int = 1200  # trained on


def read(path: Path = RESULTS) -> list[Run]:
    """Runs of a file; none where it does not exist."""
    if not path.exists():
        return []
    return [
        Run(**json.loads(line)) for line in path.read_text().rpartition("\n")[0].splitlines()
    ]  # a killed run may leave half a line


def measure(
    drop_rate: float, seed: int, steps: int, folder: Path, clips: tuple[int, int] = (1200, 200)
) -> Run:
    """Pre-train and evaluate, or continue an interrupted run of the same settings below ``folder``."""
    out = folder / f"steps{steps}_clips{clips[0]}_drop{round(100 * drop_rate)}_seed{seed}"
    demo = DemoConfig(
        out=str(out), world=str(folder / "world"), steps=steps, drop_rate=drop_rate, seed=seed, precision="fp32",
        train_clips=clips[0], test_clips=clips[1],
    )  # fmt: skip
    summary = run_demo(demo, progress=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Run(
        drop_rate=drop_rate,
        seed=seed,
        steps=steps,
        **{
            name: float(summary[name])
            for name in (*MEASURES, "t2v_r10_before", "motion_probe_before")
        },
        train_gflops=round(step_flops(preset("tiny"), 1, drop_rate, features=False) / 1e9, 3),
        device=machine.name(device),
        versions=machine.versions(device),
        commit=machine.commit(),
        date=machine.today(),
        clips=clips[0],
    )


def spread(runs: Sequence[Run], measure: str) -> tuple[float, float | None]:
    """Mean and standard deviation over the seeds; no deviation of one run."""
    values = [getattr(run, measure) for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _cell(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def markdown(runs: Sequence[Run]) -> str:
    """One row a drop rate, most dropped first: mean and standard deviation over the seeds."""
    rows = [
        "| drop rate | training GFLOPs a clip | " + " | ".join(MEASURES.values()) + " | seeds |",
        "|---" * (3 + len(MEASURES)) + "|",
    ]
    for steps, drop_rate in sorted({(run.steps, -run.drop_rate) for run in runs}):
        group = [run for run in runs if (run.steps, -run.drop_rate) == (steps, drop_rate)]
        cells = [_cell(*spread(group, measure)) for measure in MEASURES]
        rows.append(
            f"| {-drop_rate:.0%} | {group[0].train_gflops:.2f} | "
            + " | ".join(cells)
            + f" | {len(group)} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="pre-train the demo's world at several drop rates; about 90 minutes on 2 cores, resumable"
    )
    parser.add_argument("--drop-rate", type=float, nargs="+", default=DROP_RATES)
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--clips", type=int, nargs=2, default=(1200, 200), help="trained on and held out"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/accuracy"), help="worlds and runs; several GB"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="append the runs to this file")
    given = parser.parse_args()
    for seed in given.seed:  # a whole row of the table before the next seed: an interrupted command leaves comparable runs
        for drop_rate in given.drop_rate:
            wanted = (drop_rate, seed, given.steps, given.clips[0])
            if any(
                (run.drop_rate, run.seed, run.steps, run.clips) == wanted for run in read(given.out)
            ):
                continue
            run = measure(drop_rate, seed, given.steps, given.folder, tuple(given.clips))
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with given.out.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(run)) + "\n")
            print(run, flush=True)
    print(
        markdown(
            [
                run
                for run in read(given.out)
                if (run.steps, run.clips) == (given.steps, given.clips[0])
            ]
        )
    )


if __name__ == "__main__":
    main()
