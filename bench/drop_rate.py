"""``python -m bench.drop_rate``: the paper's tables of GFLOPs against drop rate, with measured time and memory of training and inference.

Table 5's multimodal model and Table 6's video model at its input sizes, at drop rates of 75, 50, 25 and 0 %: published GFLOPs, the paper's
counting, true counts; then ours, plain torch and, for video, another library's tower on this device, at full geometry and a small batch.
The video model alone is a classifier in fine-tuning. Recipe "paper", without dropout. On a CPU compiled contenders join at one drop rate only.

Takes about an hour on 2 cores. With --resume what the results hold for this code is not measured again, so the command may be killed at any
time and repeated. ``python -m bench.report`` makes tables and figures of the lines.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vatt_fast.config import MEDIUM, PRESETS, TowerConfig, VATTConfig, preset
from vatt_fast.flops import true_flops
from vatt_fast.kernels import dispatch
from vatt_fast.paper_tables import convention_flops, flops_table

from . import results, towers
from .floors import MODALITIES, Mode, step_flops
from .machine import DTYPES
from .race import Contender, compare
from .results import Line
from .setting import Setting, gate, sweep_options, sweep_setting
from .step import (
    CLASSES,
    Formulation,
    Trainer,
    classification_loss,
    describe,
    formulations,
    task_of,
)
from .timer import first_line

DROP_RATES = (0.75, 0.5, 0.25, 0.0)
_COMPILED_AT = 0.5  # on a CPU
_UNUSED = TowerConfig(depth=1, dim=16, mlp_dim=16, num_heads=1, head_dim=16)


class Configuration(NamedTuple):
    config: VATTConfig
    modalities: tuple[str, ...]
    published_as: tuple[int, str] | None  # table and configuration of ``flops_table``


def _video(frames: int, side: int) -> Configuration:
    config = VATTConfig(
        video=MEDIUM,
        audio=_UNUSED,
        text=_UNUSED,
        vocab_size=2,
        frames=frames,
        height=side,
        width=side,
    )
    return Configuration(config, ("video",), (6, f"medium {frames}x{side}x{side}"))


_MULTIMODAL = dataclasses.replace(
    preset("medium_base_small"), texts_per_clip=2
)  # as Table 5 counts
CONFIGURATIONS: dict[str, Configuration] = {
    "mbs_32x224x224": Configuration(_MULTIMODAL, MODALITIES, (5, "medium_base_small 32x224x224")),
    **{
        f"medium_video_{frames}x{side}x{side}": _video(frames, side)
        for frames, side in ((32, 224), (64, 224), (32, 320))
    },
    "tiny": Configuration(
        PRESETS["tiny"], MODALITIES, None
    ),  # whose accuracy bench.accuracy measures
}


class GFLOPs(NamedTuple):
    """Forward, one clip."""

    published: float | None
    convention: float  # as the paper counts: all patches projected, two texts
    true: float  # kept patches projected, features of all tokens, the configuration's own texts
    timed: float  # as true, the last blocks working for AGG alone: what our contenders are timed at


def gflops(configuration: str, drop_rate: float) -> GFLOPs:
    config, modalities, published_as = CONFIGURATIONS[configuration]
    released = config.with_recipe("released")  # the model that the profiler saw
    published = {
        (row["table"], row["configuration"], row["drop_rate"]): row["published_gflops"]
        for row in flops_table()
    }
    training = modalities == MODALITIES or drop_rate > 0  # the graph that the paper's rows are of
    return GFLOPs(
        published.get((*published_as, drop_rate)) if published_as else None,
        convention_flops(released, drop_rate, modalities=modalities, training=training) / 1e9,
        sum(true_flops(config, drop_rate, modalities=modalities).values()) / 1e9,
        step_flops(config, 1, drop_rate, features=False, mode="fwd", modalities=modalities) / 1e9,
    )


def contenders_of(trainer: Trainer, mode: Mode, compiled: bool) -> dict[str, Contender]:
    """Ours and plain torch, eager and, if so asked, compiled; for video alone also VideoMAE's tower."""
    formulated = formulations(("auto", "plain"), ("default",) if compiled else ())
    found = {
        each.describe(): Contender(each.ours, functools.partial(_calls, trainer, each, mode))
        for each in formulated
    }
    if trainer.modalities == ("video",):
        found["videomae"] = Contender(
            False,
            functools.partial(_videomae_calls, trainer, mode),
            alike=False,
            package="transformers",
        )
    return found


def _calls(trainer: Trainer, formulation: Formulation, mode: Mode) -> list[Callable[[], Tensor]]:
    return (
        trainer.inference_of(formulation) if mode == "fwd" else trainer.step_of(formulation, False)
    )


def _videomae_calls(trainer: Trainer, mode: Mode) -> list[Callable[[], Tensor]] | str:
    """The other library's tower on the same batches, its clips normalised beforehand. It projects every patch, and its last block works for
    all tokens, whose mean it pools."""
    tower = towers.videomae(trainer.config, trainer.device)
    if isinstance(tower, str):
        return tower
    head = nn.Linear(trainer.config.video.dim, CLASSES, device=trainer.device)
    optimizer = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=1e-5, fused=True)
    tower.train(mode != "fwd")

    def infer(inputs: dict[str, Tensor | None]) -> Tensor:
        with trainer.autocast(), torch.no_grad():
            return head(towers.videomae_features(tower, inputs))

    def step(inputs: dict[str, Tensor | None]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with trainer.autocast():
            loss = classification_loss(head(towers.videomae_features(tower, inputs)))
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = [
        towers.videomae_inputs(trainer.config, each["video"], each.get("video_keep"))
        for each in trainer.batches
    ]
    return [functools.partial(infer if mode == "fwd" else step, inputs) for inputs in batches]


class Cell(NamedTuple):
    """One of the table: a configuration at a drop rate, in training or inference."""

    configuration: str
    drop_rate: float
    mode: Mode
    batch: int
    compiled: bool  # with compiled contenders

    @property
    def case(self) -> str:
        return f"{self.configuration}_drop{round(100 * self.drop_rate)}_b{self.batch}"


def cells(
    configurations: Sequence[str],
    modes: Sequence[Mode],
    drop_rates: Sequence[float],
    *,
    batch: int | None,
    compiled_at: Sequence[float],
    cuda: bool,
) -> list[Cell]:
    """Configuration by configuration. A batch of None is 1 clip on a CPU and 16 on a GPU, of tiny 32."""

    def size(name: str) -> int:
        return batch or (32 if name == "tiny" else 16 if cuda else 1)

    return [
        Cell(name, drop_rate, mode, size(name), drop_rate in compiled_at)
        for name in configurations
        for mode in modes
        for drop_rate in drop_rates
    ]


def measure(setting: Setting, trainer: Trainer, cell: Cell) -> tuple[list[Line], dict[str, str]]:
    """Lines of a cell, and {contender: reason} of those that are absent or failed."""
    trainer.set_batch(cell.batch, cell.drop_rate)
    task = task_of(trainer, cell.case, cell.mode, cell.batch, cell.drop_rate)
    contenders = contenders_of(trainer, cell.mode, cell.compiled)
    return compare(
        setting,
        task,
        contenders,
        between=functools.partial(trainer.optimizer.zero_grad, set_to_none=True),
    )


def measure_all(
    setting: Setting, wanted: Sequence[Cell], dtype: str, out: Path
) -> list[tuple[str, str, str]]:
    """Measure cells and append their lines, until the setting's deadline; (cell, contender, reason) of what did not run."""
    missing: list[tuple[str, str, str]] = []
    name, trainer = "", None
    for cell in wanted:
        if setting.deadline is not None and time.monotonic() > setting.deadline:
            missing.append((f"{cell.case} {cell.mode}", "all", "out of time; --resume continues"))
            continue
        try:
            if trainer is None or cell.configuration != name:
                trainer, name = (
                    None,
                    cell.configuration,
                )  # the old one's memory is free before the new one takes its own
                config, modalities, _ = CONFIGURATIONS[name]
                trainer = Trainer(
                    config, cell.batch, cell.drop_rate, setting.device, DTYPES[dtype], modalities
                )
            lines, absent = measure(setting, trainer, cell)
        except (
            Exception
        ) as error:  # out of memory with all contenders' state at once, say: the other cells go on
            missing.append((f"{cell.case} {cell.mode}", "all", first_line(error)))
            continue
        for line in lines:
            print(describe(line), flush=True)
        missing += [
            (f"{cell.case} {cell.mode}", contender, reason) for contender, reason in absent.items()
        ]
        results.append(out, lines)
    return missing


def unmeasured(wanted: Sequence[Cell], dtype: str, out: Path, device: str) -> list[Cell]:
    """Those of which ``out`` holds no line of ours for this code, or none of ours compiled where that is wanted."""

    def measured(cell: Cell) -> bool:
        lines = results.measured(
            out, op="step", case=cell.case, mode=cell.mode, dtype=dtype, device=device, ours=True
        )
        return any(line.backend.endswith("_compiled") or not cell.compiled for line in lines)

    return [cell for cell in wanted if not measured(cell)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="time and memory against drop rate; about an hour on 2 cores"
    )
    sweep_options(parser, seconds=60)
    parser.add_argument(
        "--configuration", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS
    )
    parser.add_argument("--drop-rate", type=float, nargs="+", default=DROP_RATES)
    parser.add_argument(
        "--batch", type=int, help="clips; 1 on a CPU and 16 on a GPU, of tiny 32, unless given"
    )
    parser.add_argument(
        "--compiled-at",
        type=float,
        nargs="*",
        help="drop rates with compiled contenders; all on a GPU, 0.5 on a CPU",
    )
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    setting, dtype, out = sweep_setting(given, clock="perf_counter", rounds=given.rounds, warmup=0)
    on_gpu = given.device == "cuda"
    compiled_at = (
        given.compiled_at
        if given.compiled_at is not None
        else given.drop_rate
        if on_gpu
        else [_COMPILED_AT]
    )
    wanted = cells(
        given.configuration,
        given.mode,
        given.drop_rate,
        batch=given.batch,
        compiled_at=compiled_at,
        cuda=on_gpu,
    )
    if given.resume:
        wanted = unmeasured(wanted, dtype, out, setting.device_name)
    if not wanted:
        return 0
    gate(setting, dispatch.OPS, dtype, chosen_only=True)
    if reason := setting.refusal():
        raise SystemExit(f"nothing is timed: {reason}")
    missing = measure_all(setting, wanted, dtype, out)
    for each in missing:
        print(f"absent: {': '.join(each)}", flush=True)
    return int(
        any(contender == "all" or contender.startswith("auto") for _, contender, _ in missing)
    )


if __name__ == "__main__":
    raise SystemExit(main())
