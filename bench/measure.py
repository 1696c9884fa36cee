"""One race, one line: contenders against each other, in ops and whole steps alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vatt_fast.kernels.cases import Case

from . import calls, contenders, lines, machine
from .contenders import Contender
from .floors import Mode, Work, work
from .lines import Line
from .machine import DTYPES, Ceilings
from .setting import Setting
from .timer import (
    Call,
    Timing,
    first_line,
    interleaved,
    peak_bytes,
    peak_resident,
    side_stream,
    trim_host_memory,
)


class Task(NamedTuple):
    """What the contenders do, as its lines name it."""

    op: str  # or "step"
    case: str
    dtype: str
    mode: Mode  # of a step: fwd+bwd is training, fwd inference
    work: Work  # of a step FLOPs alone
    drop_rate: float | None
    batch: int = 0  # clips of a step
    dropout: float = 0.0
    error_batch: int | None = None


Absent = dict[str, str]  # contender -> why there is no line of it


def measure_op(
    setting: Setting, op: str, case: Case, dtype: str, modes: Sequence[Mode]
) -> tuple[list[Line], Absent]:
    """Lines of every contender that ran on a case, and {contender: reason} of the others."""
    absent: Absent = {}
    torch._dynamo.reset()  # peers are compiled for this case alone
    trim_host_memory()
    found: list[Line] = []
    rate = case.origin.drop_rate if case.origin else None
    batch = calls.reduced(case, setting.device).batch
    with side_stream(setting.device):
        present = contenders.of_op(setting, op, case, dtype, absent)
        for mode in modes:
            least = work(case, mode, DTYPES[dtype].itemsize)
            task = Task(op, case.name, dtype, mode, least, rate, error_batch=batch)
            measured, missing = race(setting, task, present)
            found += measured
            absent |= {f"{name} {mode}": reason for name, reason in missing.items()}
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return found, absent


class _Ready(NamedTuple):
    """A contender that has run once."""

    contender: Contender
    calls: Sequence[Call]
    peak_bytes: int | None
    peak_resident: int | None
    output: Tensor | None  # of an inference


def race(
    setting: Setting,
    task: Task,
    present: Sequence[Contender],
    *,
    between: Callable[[], Any] = lambda: None,
) -> tuple[list[Line], Absent]:
    """Time contenders against each other; a line of each, and {contender: reason} of the others.

    Args:
        between: frees what a contender leaves behind, such as gradients.
    """
    absent: Absent = {}
    ready: dict[str, _Ready] = {}
    for each in present:
        try:
            found = _first_call(task, each, setting.device)
        except Exception as error:
            found = first_line(error)
        if isinstance(found, str):
            absent[each.name] = found
        else:
            ready[each.name] = found
        between()
        if setting.device.type == "cuda" and task.op == "step":
            torch.cuda.empty_cache()
    for name, reason in _others(task, ready.values()).items():
        del ready[name]
        absent[name] = reason
    ceilings = setting.ceilings_of(task.dtype)
    clock, told = _times(setting, {name: each.calls for name, each in ready.items()}, absent)
    rivals = [each for each in present if each.name in told and not each.ours and each.alike]
    best = min(rivals, key=lambda each: told[each.name].p50, default=None)
    made = [_line(setting, task, ready[name], told, clock, best, ceilings) for name in told]
    return made, absent


def _first_call(task: Task, each: Contender, device: torch.device) -> _Ready | str:
    """Build a contender and run it once: here code is compiled, and Adam's state made."""
    built = each.build(task.mode)
    if isinstance(built, str):
        return built
    results: list[Any] = []
    resident = None
    if device.type == "cuda":
        results.append(built[0]())
    else:
        trim_host_memory()  # of the contenders before
        resident = peak_resident(lambda: results.append(built[0]()))
    output = None
    if task.op == "step":
        if not torch.isfinite(results[0]).all():
            raise FloatingPointError("the result is not finite")
        # the losses of training steps differ: the weights move
        output = results[0] if task.mode == "fwd" else None
    results.clear()
    peak = None
    if task.mode != "bwd":  # what the forward kept would be missing
        peak = peak_bytes(built[0], device)
        if task.op == "step" and device.type == "cuda":
            peak += torch.cuda.memory_allocated(device)
    return _Ready(each, built, peak, resident, output)


def _times(
    setting: Setting, ready: Mapping[str, Sequence[Call]], absent: Absent
) -> tuple[str, dict[str, Timing]]:
    """The clock, and the times by it: where a graph cannot capture somebody, events time all."""

    def run(clock: str) -> tuple[str, dict[str, Timing], Absent]:
        failed: Absent = {}
        options = dict(rounds=setting.rounds, warmup=setting.warmup, **setting.limits())
        told = interleaved(ready, clock=setting.make_clock(clock), failed=failed, **options)
        return clock, told, failed

    clock, told, failed = run(setting.clock)
    if failed and clock == "cuda_graph":
        by_events = run("cuda_events")
        if len(by_events[1]) > len(told):
            clock, told, failed = by_events
    absent |= failed
    return clock, told


def _others(task: Task, ready: Iterable[_Ready]) -> Absent:
    """Contenders of an inference whose outputs are not the first peer's."""
    found = [(each.contender, each.output.double()) for each in ready if each.output is not None]
    first = next((output for each, output in found if not each.ours), None)
    if first is None:
        return {}
    bound = 1e-3 if task.dtype == "fp32" else 0.1  # roundings of a dozen blocks
    wrong = {}
    for each, output in found:
        error = float((output - first).norm() / first.norm())
        if not error < bound:
            wrong[each.name] = f"other results than the first peer's: they differ by {error:.1e}"
    return wrong


def _line(
    setting: Setting,
    task: Task,
    ready: _Ready,
    told: dict[str, Timing],
    clock: str,
    best: Contender | None,
    ceilings: Ceilings,
) -> Line:
    each, timing = ready.contender, told[ready.contender.name]
    compute = task.work.bound(ceilings) == "compute"
    speed = None  # another loss does other work
    if each.alike:
        speed = (task.work.flops / 1e9 if compute else task.work.bytes / 1e6) / timing.p50
    error, error_of = calls.worst(each.errors, task.mode) if each.errors else (None, None)
    compared: dict[str, Any] = {}
    if each.ours and best is not None:
        compared = dict(
            speedup_over_best_peer=timing.speedup_over(told[best.name]),
            best_peer=best.name,
            best_peer_ms_p50=told[best.name].p50,
            best_peer_error=calls.worst(best.errors, task.mode)[0] if best.errors else None,
        )
    of_task = ("op", "case", "dtype", "mode", "drop_rate", "dropout")
    line = Line(
        **{name: getattr(task, name) for name in of_task},
        backend=each.name,
        ours=each.ours,
        ms_p20=timing.p20,
        ms_p50=timing.p50,
        ms_p80=timing.p80,
        rounds=len(timing.ms),
        clock=clock,
        peak_bytes=ready.peak_bytes,
        peak_resident=ready.peak_resident,
        stolen=timing.stolen,
        tflops=speed if compute else None,
        gb_per_s=None if compute else speed,
        share_of_ceiling=speed and speed / (ceilings.tflops if compute else ceilings.gb_per_s),
        error=error,
        error_of=error_of,
        error_batch=task.error_batch if each.errors else None,
        device=setting.device_name,
        versions=setting.versions | machine.package_version(each.package),
        commit=machine.commit(),
        date=machine.today(),
        clips_per_second=1e3 * task.batch / timing.p50 if task.batch else None,
        **compared,
    )
    return replace(line, source=lines.source_of(line))
