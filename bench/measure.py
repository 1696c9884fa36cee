"""One race, one line: contenders against each other, in ops and whole steps alike."""

from collections.abc import Callable, Mapping, Sequence
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
    ready: dict[str, Sequence[Call]] = {}
    peaks: dict[str, tuple[int | None, int | None]] = {}  # by the call, of the process
    outputs: dict[str, Tensor] = {}
    for each in present:
        try:
            before = _allocated(setting.device)
            built = each.build(task.mode)
            if isinstance(built, str):
                absent[each.name] = built
                continue
            result, resident = _first_call(built[0], setting.device)
            if task.op == "step":
                if not torch.isfinite(result).all():
                    raise FloatingPointError("the result is not finite")
                # the losses of training steps differ: the weights move
                if task.mode == "fwd" and each.alike:
                    outputs[each.name] = result
            del result
            peaks[each.name] = _peak(task, each, built[0], setting.device, before), resident
            ready[each.name] = built
        except Exception as error:
            absent[each.name] = first_line(error)
        between()
        if setting.device.type == "cuda" and task.op == "step":
            torch.cuda.empty_cache()
    for name, reason in _others(task, outputs, present).items():
        del ready[name]
        absent[name] = reason
    ceilings = setting.ceilings_of(task.dtype)
    made = []
    races = _races(setting, ready, present, absent)
    for each in present:
        if found := [(clock, told) for clock, told in races.items() if each.name in told]:
            # of two clocks ours is told by the one by which it does worse
            clock, told = found[0]
            if each.ours:
                clock, told = min(found, key=lambda one: _speedup(each, one[1], present))
            best = best_peer(told, present)
            made.append(_line(setting, task, each, told, clock, peaks[each.name], best, ceilings))
    return made, absent


def _races(
    setting: Setting,
    ready: Mapping[str, Sequence[Call]],
    present: Sequence[Contender],
    absent: Absent,
) -> dict[str, dict[str, Timing]]:
    """{clock: times}. What no graph can capture is timed by events, beside those it meets."""
    failed: Absent = {}

    def run(clock: str, among: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        return interleaved(
            among,
            rounds=setting.rounds,
            warmup=setting.warmup,
            clock=setting.make_clock(clock),
            failed=failed,
            **setting.limits(),
        )

    races = {setting.clock: run(setting.clock, ready)}
    if failed and setting.clock == "cuda_graph":
        rivals = _rivals(failed, races[setting.clock], present)
        again = {name: ready[name] for name in (*failed, *rivals)}
        failed.clear()
        races["cuda_events"] = run("cuda_events", again)
    absent.update(failed)
    return races


def _rivals(failed: Absent, told: dict[str, Timing], present: Sequence[Contender]) -> list[str]:
    """Of those that were timed: ours and the best peer, or all if one of ours is in ``failed``."""
    best = best_peer(told, present)
    if any(each.ours and each.name in failed for each in present):
        best = None
    return [
        each.name
        for each in present
        if each.name in told and (each.ours or best is None or each is best)
    ]


def best_peer(told: dict[str, Timing], present: Sequence[Contender]) -> Contender | None:
    theirs = [each for each in present if not each.ours and each.alike and each.name in told]
    return min(theirs, key=lambda each: told[each.name].p50, default=None)


def _speedup(each: Contender, told: dict[str, Timing], present: Sequence[Contender]) -> float:
    best = best_peer(told, present)
    return told[each.name].speedup_over(told[best.name]) if best else float("inf")


def _others(task: Task, outputs: dict[str, Tensor], present: Sequence[Contender]) -> Absent:
    """Contenders of an inference whose outputs are not the first peer's."""
    ours = {each.name for each in present if each.ours}
    yardstick = next((value for name, value in outputs.items() if name not in ours), None)
    if yardstick is None:
        return {}
    wanted = yardstick.double()
    bound = 1e-3 if task.dtype == "fp32" else 0.1  # roundings of a dozen blocks
    found = {}
    for name, value in outputs.items():
        error = float((value.double() - wanted).norm() / wanted.norm())
        if not error < bound:
            found[name] = f"other results than the first peer's: they differ by {error:.1e}"
    return found


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _first_call(call: Call, device: torch.device) -> tuple[Any, int | None]:
    """Its result, and what the process held at most: here code is compiled, Adam's state made."""
    if device.type == "cuda":
        return call(), None
    trim_host_memory()  # of the contenders before
    found: list[Any] = []
    resident = peak_resident(lambda: found.append(call()))
    return found[0], resident


def _peak(task: Task, each: Contender, call: Call, device: torch.device, before: int) -> int | None:
    """Of an op beyond its inputs; of a step on a GPU everything that is its own."""
    if task.mode == "bwd":
        return None  # what the forward kept would be missing
    kept = 0
    if task.op == "step":  # another model lies beside ours, which does not count for it
        kept = _allocated(device) - (0 if each.alike else before)
    return kept + peak_bytes(call, device)


def _line(
    setting: Setting,
    task: Task,
    each: Contender,
    told: dict[str, Timing],
    clock: str,
    peaks: tuple[int | None, int | None],
    best: Contender | None,
    ceilings: Ceilings,
) -> Line:
    timing = told[each.name]
    compute = task.work.bound(ceilings) == "compute"
    speed = None  # another model does other work
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
    line = Line(
        op=task.op,
        case=task.case,
        dtype=task.dtype,
        mode=task.mode,
        backend=each.name,
        ours=each.ours,
        ms_p20=timing.p20,
        ms_p50=timing.p50,
        ms_p80=timing.p80,
        rounds=len(timing.ms),
        clock=clock,
        peak_bytes=peaks[0],
        peak_resident=peaks[1],
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
        dropout=task.dropout,
        drop_rate=task.drop_rate,
        clips_per_second=1e3 * task.batch / timing.p50 if task.batch else None,
        **compared,
    )
    return replace(line, source=lines.source_of(line))
