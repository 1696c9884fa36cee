"""``python -m bench.drop_rate``: the paper's tables of GFLOPs against drop rate, with measured time and memory of training and inference.

Table 5's multimodal model and Table 6's video model at its input sizes, at drop rates of 75, 50, 25 and 0 %: published GFLOPs, the paper's
counting, true counts; then ours, plain torch and, for video, another library's tower on this device, at full geometry and a small batch.
The video model alone is a classifier in fine-tuning. On a CPU compiled contenders join at one drop rate only.

Takes about an hour on 2 cores. With --resume what the results hold for this code is not measured again, so the command may be killed at any
time and repeated. ``python -m bench.report`` makes tables and figures of the lines.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vatt_fast.config import MEDIUM, PRESETS, TowerConfig, VATTConfig, preset
from vatt_fast.flops import convention_flops, flops_table, true_flops
from vatt_fast.kernels import dispatch

from . import results
from .floors import MODALITIES, Mode
from .machine import DTYPES
from .results import Line
from .run import Setting, gate
from .step import Contender, Formulation, Trainer, compare, describe, formulations, task_of

DROP_RATES = (0.75, 0.5, 0.25, 0.0)
_COMPILED_AT = 0.5  # on a CPU
_UNUSED = TowerConfig(depth=1, dim=16, mlp_dim=16, num_heads=1, head_dim=16)


class Configuration(NamedTuple):
    config: VATTConfig
    modalities: tuple[str, ...]
    published_as: tuple[int, str] | None  # table and configuration of ``flops_table``


def _video(frames: int, side: int) -> Configuration:
    sizes = VATTConfig(video=MEDIUM, frames=frames, height=side, width=side)
    small = dataclasses.replace(sizes.with_recipe("released"), audio=_UNUSED, text=_UNUSED, vocab_size=2)
    return Configuration(small, ("video",), (6, f"medium {frames}x{side}x{side}"))


# with two texts a clip, as Table 5 counts
_MULTIMODAL = dataclasses.replace(preset("medium_base_small", "released"), texts_per_clip=2)
CONFIGURATIONS: dict[str, Configuration] = {
    "mbs_32x224x224": Configuration(_MULTIMODAL, MODALITIES, (5, "medium_base_small 32x224x224")),
    **{f"medium_video_{frames}x{side}x{side}": _video(frames, side) for frames, side in ((32, 224), (64, 224), (32, 320))},
    "tiny": Configuration(PRESETS["tiny"], MODALITIES, None),  # whose accuracy bench.accuracy measures
}


class GFLOPs(NamedTuple):
    """Forward, one clip."""

    published: float | None
    convention: float  # as the paper counts: all patches projected, two texts
    true: float  # kept patches projected, features of all tokens, the configuration's own texts


def gflops(configuration: str, drop_rate: float) -> GFLOPs:
    config, modalities, published_as = CONFIGURATIONS[configuration]
    published = {(row["table"], row["configuration"], row["drop_rate"]): row["published_gflops"] for row in flops_table()}
    training = modalities == MODALITIES or drop_rate > 0  # the graph that the paper's rows are of
    return GFLOPs(
        published.get((*published_as, drop_rate)) if published_as else None,
        convention_flops(config, drop_rate, modalities=modalities, training=training) / 1e9,
        sum(true_flops(config, drop_rate, modalities=modalities).values()) / 1e9,
    )


def contenders_of(trainer: Trainer, mode: Mode, compiled: bool) -> dict[str, Contender]:
    """Ours and plain torch, eager and, if so asked, compiled."""
    found = formulations(("auto", "plain"), ("default",) if compiled else ())
    return {each.describe(): Contender(each.ours, functools.partial(_calls, trainer, each, mode)) for each in found}


def _calls(trainer: Trainer, formulation: Formulation, mode: Mode):
    return trainer.inference_of(formulation) if mode == "fwd" else trainer.step_of(formulation, False)


def measure(
    setting: Setting, trainer: Trainer, name: str, drop_rate: float, mode: Mode, batch: int, compiled: bool
) -> tuple[list[Line], dict[str, str]]:
    """Lines of one cell of the table, and {contender: reason} of those that failed."""
    trainer.set_batch(batch, drop_rate)
    task = task_of(trainer, case_name(name, drop_rate, batch), mode, batch, drop_rate)
    contenders = contenders_of(trainer, mode, compiled)
    return compare(setting, task, contenders, between=functools.partial(trainer.optimizer.zero_grad, set_to_none=True))


def case_name(configuration: str, drop_rate: float, batch: int) -> str:
    return f"{configuration}_drop{round(100 * drop_rate)}_b{batch}"


def _cells(given: argparse.Namespace) -> Iterator[tuple[str, float, Mode]]:
    for name in given.configuration:
        for mode in given.mode:
            for drop_rate in given.drop_rate:
                yield name, drop_rate, mode


def main(arguments: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="time and memory against drop rate; about an hour on 2 cores")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--configuration", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--drop-rate", type=float, nargs="+", default=DROP_RATES)
    parser.add_argument("--mode", nargs="+", default=["fwd", "fwd+bwd"], choices=["fwd", "fwd+bwd"], help="inference, training")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="bf16 where the device multiplies it in hardware unless given")
    parser.add_argument("--batch", type=int, default=16 if cuda else 1, help="clips; of tiny 32")
    parser.add_argument("--compiled-at", type=float, nargs="*", help="drop rates with compiled contenders; all on a GPU, 0.5 on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="of a cell's timed rounds; at least two rounds are run")
    parser.add_argument("--resume", action="store_true", help="leave out what the results hold for this code")
    parser.add_argument("--out", type=Path, help="append result lines to this file; bench/results/<device>.jsonl unless given")
    given = parser.parse_args(arguments)
    setting = Setting(torch.device(given.device), clock="perf_counter", rounds=given.rounds, warmup=0, seconds=given.seconds)
    dtype = given.dtype or ("bf16" if dispatch.native_bf16(setting.device) else "fp32")
    out = given.out or results.of_device(setting.device_name)
    compiled_at = given.compiled_at if given.compiled_at is not None else given.drop_rate if given.device == "cuda" else [_COMPILED_AT]
    status, name, trainer, gated = 0, "", None, False
    for cell in _cells(given):
        configuration, drop_rate, mode = cell
        batch = 32 if configuration == "tiny" and given.batch == parser.get_default("batch") else given.batch
        wanted = dict(op="step", case=case_name(configuration, drop_rate, batch), mode=mode, dtype=dtype, device=setting.device_name)
        if given.resume and results.measured(out, **wanted):
            continue
        if not gated:
            gate(setting, dispatch.OPS, dtype, chosen_only=True)
            if red := {where: reason for where, reason in setting.refused.items() if "red" in reason}:
                raise SystemExit(f"parity is red, nothing is timed: {red}")
            gated = True
        if configuration != name:
            trainer, name = None, configuration  # the old one's memory is free before the new one takes its own
            config, modalities, _ = CONFIGURATIONS[configuration]
            trainer = Trainer(config, batch, drop_rate, setting.device, DTYPES[dtype], modalities)
        assert trainer is not None
        lines, absent = measure(setting, trainer, configuration, drop_rate, mode, batch, drop_rate in compiled_at)
        for line in lines:
            print(describe(line), flush=True)
        for contender, reason in absent.items():
            print(f"failed: {cell}: {contender}: {reason}", flush=True)
            status = 1
        results.append(out, lines)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
