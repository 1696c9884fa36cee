"""Whole steps against each other: what contenders do, how they are timed, and the lines of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import machine
from .floors import Mode
from .machine import DTYPES
from .results import Line
from .setting import Setting
from .timer import (
    HostClock,
    Timing,
    first_line,
    interleaved,
    peak_bytes,
    peak_resident,
    trim_host_memory,
)


class Contender(NamedTuple):
    """One who does the whole of a step or an inference."""

    ours: bool
    build: Callable[
        [], Sequence[Callable[[], Tensor]] | str
    ]  # calls on rotating batches, each returning a loss or outputs; or why none
    alike: bool = True  # False: another model of the same size, which it brings along
    package: str | None = None  # a library's


class Task(NamedTuple):
    """What the contenders do, as its result lines name it."""

    case: str
    mode: Mode  # fwd+bwd: a training step; fwd: inference
    dtype: str
    batch: int
    drop_rate: float
    flops: int
    dropout: float


def compare(
    setting: Setting,
    task: Task,
    contenders: Mapping[str, Contender],
    *,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[Line], dict[str, str]]:
    """Time contenders against each other; a line of each, and {contender: reason} of those that are absent or failed.

    Args:
        between: frees what a contender leaves behind, such as gradients.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # one code object, a contender after the other
    calls: dict[str, Sequence[Callable[[], Tensor]]] = {}
    peaks: dict[str, tuple[int, int | None]] = {}
    absent: dict[str, str] = {}
    outputs: dict[str, Tensor] = {}
    for name, contender in contenders.items():
        others = (
            0
            if contender.alike or setting.device.type != "cuda"
            else torch.cuda.memory_allocated(setting.device)
        )
        try:
            mine = contender.build()
            if isinstance(mine, str):
                absent[name] = mine
                continue
            result, resident = _first_call(mine[0], setting.device)
            if not torch.isfinite(result).all():
                raise FloatingPointError("the result is not finite")
            if (
                task.mode == "fwd" and contender.alike
            ):  # of a training step every loss is another: the weights move
                outputs[name] = result
            peaks[name] = (_peak(mine[0], setting.device) - others, resident)
            calls[name] = mine
        except Exception as error:
            absent[name] = first_line(error)
        between()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    yardstick = next((each for name, each in outputs.items() if not contenders[name].ours), None)
    for name, found in outputs.items():
        if yardstick is not None and (
            reason := _another_result(found, yardstick, DTYPES[task.dtype])
        ):
            del calls[name]
            absent[name] = reason
    times = interleaved(
        calls,
        rounds=setting.rounds,
        warmup=setting.warmup,
        clock=HostClock(setting.device),
        failed=absent,
        **setting.limits(),
    )
    best = min(
        (name for name in times if contenders[name].alike and not contenders[name].ours),
        key=lambda name: times[name].p50,
        default=None,
    )
    ceiling = setting.ceilings_of(task.dtype).tflops
    return [
        _line(setting, task, name, contenders[name], times, peaks[name], best, ceiling)
        for name in times
    ], absent


def _another_result(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> str | None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    bound = 1e-3 if dtype == torch.float32 else 0.1  # roundings of a dozen blocks
    return (
        None
        if error < bound
        else f"other results than the first peer's: they differ by {error:.1e}"
    )


def _line(
    setting: Setting,
    task: Task,
    name: str,
    contender: Contender,
    times: dict[str, Timing],
    peaks: tuple[int, int | None],
    best: str | None,
    ceiling: float,
) -> Line:
    timing = times[name]
    tflops = (
        task.flops / timing.p50 / 1e9 if contender.alike else None
    )  # another model does other work
    compared: dict[str, Any] = {}
    if contender.ours and best is not None:
        compared = dict(
            speedup_over_best_peer=timing.speedup_over(times[best]),
            best_peer=best,
            best_peer_ms_p50=times[best].p50,
        )
    return Line(
        op="step",
        case=task.case,
        dtype=task.dtype,
        mode=task.mode,
        backend=name,
        ours=contender.ours,
        ms_p20=timing.p20,
        ms_p50=timing.p50,
        ms_p80=timing.p80,
        rounds=len(timing.ms),
        clock=HostClock.name,
        peak_bytes=peaks[0],
        peak_resident=peaks[1],
        stolen=timing.stolen,
        tflops=tflops,
        gb_per_s=None,
        share_of_ceiling=None if tflops is None else tflops / ceiling,
        error=None,
        error_of=None,
        error_batch=None,
        device=setting.device_name,
        versions=setting.versions | machine.package_version(contender.package),
        commit=machine.commit(),
        date=machine.today(),
        dropout=task.dropout,
        drop_rate=task.drop_rate,
        clips_per_second=1e3 * task.batch / timing.p50,
        **compared,
    )


def _first_call(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int | None]:
    """Its result, outside the measurement: here code is compiled and Adam's state allocated. And what the process held at most."""
    if device.type == "cuda":
        return call(), None
    trim_host_memory()
    found: list[Tensor] = []
    resident = peak_resident(lambda: found.append(call()))
    return found[0], resident


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    """Of a GPU everything allocated at the peak; on the CPU what the call allocates beyond weights and state."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return before + peak_bytes(call, device)
