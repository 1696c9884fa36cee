"""What is swept: whole steps by drop rate, ops by size, accuracy by drop rate."""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vatt_fast.config import preset
from vatt_fast.flops import true_flops
from vatt_fast.kernels.cases import AttentionCase, Case, NCECase, PatchEmbedCase

from . import contenders, lines, machine
from .floors import Mode, Work
from .lines import Line
from .machine import DTYPES
from .measure import Absent, Task, measure_op, race
from .peers import peers
from .setting import AUTO, Setting, is_measured
from .steps import CONFIGURATIONS, Trainer, formulations, many_compilations
from .timer import first_line, trim_host_memory

DROP_RATES = (0.75, 0.5, 0.25, 0.0)
Missing = tuple[str, str, str]  # what was not measured, of whom, why


def keep(found: Sequence[Line], out: str | Path | None) -> None:
    """Print lines, and append them to a file where there is one."""
    for line in found:
        print(lines.describe(line), flush=True)
    if out:
        lines.append(out, found)


def _in_turn(
    setting: Setting,
    wanted: Iterable[tuple[str, Callable[[], tuple[list[Line], Absent]]]],
    out: str | Path | None,
) -> tuple[list[Line], list[Missing]]:
    """Measure what is wanted, print and append its lines, until the setting's deadline."""
    measured: list[Line] = []
    missing: list[Missing] = []
    for title, measure in wanted:
        if setting.out_of_time:
            missing.append((title, "all", "out of time; --resume continues"))
            continue
        try:
            found, absent = measure()
        except Exception as error:  # such as no memory for all contenders' state: others go on
            found, absent = [], {"all": first_line(error)}
        keep(found, out)
        measured += found
        missing += [(title, who, reason) for who, reason in absent.items()]
    return measured, missing


# -- whole steps ------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One of the table: a configuration at a drop rate, in training or inference."""

    configuration: str
    drop_rate: float
    mode: Mode
    batch: int
    compile: tuple[str, ...] = ()  # modes of torch.compile beside eager

    @property
    def case(self) -> str:
        return f"{self.configuration}_drop{round(100 * self.drop_rate)}_b{self.batch}"


def measure_cells(
    setting: Setting, wanted: Sequence[Cell], dtype: str, out: Path | None
) -> list[Missing]:
    """Lines of whole steps; what is absent."""
    trainers: dict[str, Trainer] = {}  # one at a time

    def measure(cell: Cell) -> tuple[list[Line], Absent]:
        if cell.configuration not in trainers:
            trainers.clear()  # its memory is free before the next one takes its own
            config, modalities, _ = CONFIGURATIONS[cell.configuration]
            trainer = Trainer(config, setting.device, DTYPES[dtype], modalities)
            trainers[cell.configuration] = trainer
        return _measure_cell(setting, trainers[cell.configuration], cell, dtype)

    calls = [(f"{cell.case} {cell.mode}", functools.partial(measure, cell)) for cell in wanted]
    return _in_turn(setting, calls, out)[1]


def _measure_cell(
    setting: Setting, trainer: Trainer, cell: Cell, dtype: str
) -> tuple[list[Line], Absent]:
    _, rate, mode, batch, compile_modes = cell
    trainer.set_batch(batch, rate, mode)
    what: dict[str, Any] = dict(batch=batch, mode=mode, modalities=trainer.modalities)
    work = Work(sum(true_flops(trainer.config, rate, features=False, **what).values()), 0)
    dropout = trainer.config.dropout if mode != "fwd" else 0.0
    task = Task("step", cell.case, dtype, mode, work, rate, batch, dropout)
    present = contenders.of_step(trainer, formulations(("auto", "plain"), compile_modes))
    with many_compilations():
        return race(setting, task, present, between=trainer.forget_gradients)


def unmeasured(wanted: Sequence[Cell], dtype: str, out: Path, setting: Setting) -> list[Cell]:
    """Cells without a fresh line of ours, or of ours compiled where that is wanted."""

    def measured(cell: Cell) -> bool:
        what = dict(op="step", case=cell.case, mode=cell.mode, dtype=dtype, ours=True)
        found = {line.backend for line in lines.measured(out, setting.machine, **what)}
        return {each.title for each in formulations(("auto",), cell.compile)} <= found

    return [cell for cell in wanted if not measured(cell)]


# -- ops --------------------------------------------------------------------------------------


def measure_cases(
    setting: Setting,
    wanted: Sequence[tuple[str, Case]],
    dtype: str,
    modes: Sequence[Mode],
    out: str | Path | None,
) -> tuple[list[Line], list[Missing]]:
    """Lines of ops at cases; what is absent."""
    calls = [
        (f"{op} {case.name}", functools.partial(measure_op, setting, op, case, dtype, modes))
        for op, case in wanted
    ]
    return _in_turn(setting, calls, out)


# -- ops by size ------------------------------------------------------------------------------

_PATCH = (4, 16, 16)
_CLIPS = ((16, 112), (32, 112), (32, 160), (32, 224), (64, 224), (64, 320))  # frames, side


def _attention(tokens: int) -> Case:
    return AttentionCase(f"scaling_tokens_{tokens}", 1, tokens, tokens, 12, 64, packed=True)


def _contrastive(clips: int) -> Case:
    return NCECase(f"scaling_clips_{clips}", clips, clips, 1, 512, bound=True)


def _clip(frames: int, side: int) -> Case:
    """The road of inference: every patch of a clip, read in place."""
    patches = (frames // _PATCH[0]) * (side // _PATCH[1]) * (side // _PATCH[2])
    shape, name = (frames, side, side, 3), f"scaling_clip_pixels_{frames * side * side}"
    return PatchEmbedCase(name, 1, patches, 3 * math.prod(_PATCH), 1024, clip=shape, patch=_PATCH)


# op -> {size: case}, AGG among the tokens
SIZES: dict[str, dict[int, Case]] = {
    "attention": {tokens: _attention(tokens) for tokens in (197, 393, 785, 1569, 3201, 6401)},
    "contrastive_lse": {1 << power: _contrastive(1 << power) for power in range(10, 17)},
    "patch_embed": {frames * side**2: _clip(frames, side) for frames, side in _CLIPS},
}
# torch.compile unrolls the peers' loop over chunks: with 64 of them a quarter of an hour was not
# enough
_COMPILED_UP_TO = {"contrastive_lse": 1 << 15}


_LONGEST = 30.0  # seconds that a call may take


def too_much(last: Line, growth: float, free: int) -> str | None:
    """Why the call of a line is not tried at a size where it would cost ``growth`` times as much.

    ``free`` bytes may be taken.
    """
    seconds, size = growth * last.ms_p50 / 1e3, growth * (last.peak_bytes or 0)
    if seconds > _LONGEST:
        return f"a call would take about {seconds:.0f} s, more than {_LONGEST:.0f}"
    if size > free:
        return f"a call would take about {size / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    return None


def free_bytes(device: torch.device) -> int:
    """Four fifths of what the device, or the machine, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 4 // 5
    trim_host_memory()  # what this process keeps is free
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 * 4 // 5


def measure_sizes(
    setting: Setting, op: str, dtype: str, modes: Sequence[Mode], out: Path | None, *, resume: bool
) -> list[Missing]:
    """Append the lines of an op, smallest size first; with ``resume`` those not measured yet.

    A contender leaves the race at a size where, by its last call, one would take too long or more
    memory than is free, if both grow with the square of the size, as those of the costliest do.
    """
    last: dict[tuple[str, str], tuple[int, Line]] = {}  # by contender and mode
    missing: list[Missing] = []
    for size, case in SIZES[op].items():
        if resume and out and is_measured(setting, out, op, case, dtype, modes):
            found = lines.measured(out, setting.machine, op=op, case=case.name, dtype=dtype)
        else:
            free = free_bytes(setting.device)
            left_out = {
                line.backend: reason
                for known, line in last.values()
                if (reason := too_much(line, (size / known) ** 2, free))
            }
            limit = _COMPILED_UP_TO.get(op, size)
            if size > limit:
                reason = f"torch.compile takes too long beyond {limit}"
                left_out |= {name: reason for name in peers(op) if name.endswith("_compiled")}
            missing += [(f"{op} {case.name}", who, why) for who, why in left_out.items()]
            if AUTO in left_out:
                continue
            names = tuple(name for name in peers(op) if name not in left_out)
            here = dataclasses.replace(setting, backends=(AUTO,), peer_names=names)
            found, others = measure_cases(here, [(op, case)], dtype, modes, out)
            missing += others
        last |= {(line.backend, line.mode): (size, line) for line in found if line.mode in modes}
    return missing


# -- accuracy by drop rate --------------------------------------------------------------------

ACCURACY = lines.RESULTS / "accuracy.jsonl"
SEEDS = (0, 1, 2)
MEASURES = {
    "t2v_r10": "text to video R@10",
    "t2v_r1": "text to video R@1",
    "a2v_r10": "audio to video R@10",
    "motion_probe": "linear probe of 8 motions",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One pre-training of the demo's world and its evaluation.

    Rates are in percent; ``before`` is the same model untrained. Held-out clips, no token dropped.
    """

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


def read_runs(path: Path = ACCURACY) -> list[Run]:
    """Runs of a file, none where it does not exist; without half a line of a killed run."""
    if not path.exists():
        return []
    return [Run(**json.loads(line)) for line in path.read_text().rpartition("\n")[0].splitlines()]


def pretrain(
    drop_rate: float, seed: int, steps: int, folder: Path, clips: tuple[int, int] = (1200, 200)
) -> Run:
    """Pre-train and evaluate, or continue an interrupted run of the same settings in ``folder``."""
    from vatt_fast.demo.run import DemoConfig, run_demo  # needs the extras of the demo

    name = f"steps{steps}_clips{clips[0]}_drop{round(100 * drop_rate)}_seed{seed}"
    demo = DemoConfig(
        out=str(folder / name),
        world=str(folder / "world"),
        steps=steps,
        drop_rate=drop_rate,
        seed=seed,
        precision="fp32",
        train_clips=clips[0],
        test_clips=clips[1],
    )
    summary = run_demo(demo, progress=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counted = true_flops(preset("tiny"), drop_rate, features=False, mode="fwd+bwd")
    told = (*MEASURES, "t2v_r10_before", "motion_probe_before")
    return Run(
        drop_rate=drop_rate,
        seed=seed,
        steps=steps,
        **{name: float(summary[name]) for name in told},
        train_gflops=round(sum(counted.values()) / 1e9, 3),
        device=machine.name(device),
        versions=machine.versions(device),
        commit=machine.commit(),
        date=machine.today(),
        clips=clips[0],
    )


def measure_accuracy(
    drop_rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    clips: tuple[int, int],
    folder: Path,
    out: Path,
) -> list[Run]:
    """Append the runs that the file does not hold, and return all of these steps and clips."""
    # all rates before the next seed: an interrupted command leaves runs that can be compared
    for seed in seeds:
        for drop_rate in drop_rates:
            wanted = (drop_rate, seed, steps, clips[0])
            known = {(run.drop_rate, run.seed, run.steps, run.clips) for run in read_runs(out)}
            if wanted not in known:
                run = pretrain(drop_rate, seed, steps, folder, clips)
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(run)) + "\n")
                print(run)
    return [run for run in read_runs(out) if (run.steps, run.clips) == (steps, clips[0])]


def accuracy_table(runs: Sequence[Run]) -> str:
    """One row a drop rate, most dropped first: mean and standard deviation over the seeds."""
    headings = ["drop rate", "training GFLOPs a clip", *MEASURES.values(), "seeds"]
    rows = []
    for steps, drop_rate in sorted({(run.steps, -run.drop_rate) for run in runs}):
        group = [run for run in runs if (run.steps, -run.drop_rate) == (steps, drop_rate)]
        cells = [f"{-drop_rate:.0%}", f"{group[0].train_gflops:.2f}"]
        for measure in MEASURES:
            values = [getattr(run, measure) for run in group]
            cells.append(f"{statistics.mean(values):.1f}")
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):.1f}"
        rows.append([*cells, len(group)])
    return lines.markdown_table(headings, rows)
