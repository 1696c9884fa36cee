"""``python -m bench.run``: time an op's backends against its peers on named cases.

    python -m bench.run --op attention --case video_mbs_drop50 --dtype bf16 --mode fwd bwd --out results.jsonl
    python -m bench.run --device cpu                    # every op at the CPU's own cases, lines to bench/results/

First the op's parity tests run in the asked dtype, and each contender's error is taken against fp64 at the case itself; what is red is not
timed. Of every contender a line is printed and, with --out, appended; ours name the best peer, its time and its error. Another loss in the
same role is timed beside them: it has no error and is never the best peer.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt_fast.kernels import dispatch
from vatt_fast.kernels.cases import Case, make

from . import machine, op_calls, results
from .floors import MODES, Mode, work
from .machine import DTYPES
from .peers import Peer, peers
from .results import Line
from .selection import at_batch, select
from .setting import AUTO, DTYPE_HELP, Setting, chosen_among, gate, is_measured, native_dtype
from .timer import (
    Timing,
    first_line,
    interleaved,
    keep_host_memory,
    peak_bytes,
    peak_resident,
    side_stream,
    trim_host_memory,
)

Function = Callable[..., tuple[Tensor, ...]]


@dataclass
class _Contender:
    name: str
    function: Function
    errors: dict[str, float]  # empty where it computes another loss
    peer: Peer | None = None
    no_backward: str | None = None  # why it is timed in mode fwd only


def measure(
    setting: Setting, op: str, case: Case, dtype: str, modes: Sequence[Mode]
) -> tuple[list[Line], dict[str, str]]:
    """Lines of every contender that ran on a case, and {contender: reason} of the others."""
    absent: dict[str, str] = {}
    torch._dynamo.reset()  # peers are compiled for this case alone
    trim_host_memory()
    lines: list[Line] = []
    with side_stream(setting.device):
        contenders = _contenders(setting, op, case, dtype, absent)
        for mode in modes:
            lines += _measure_mode(setting, op, case, dtype, mode, contenders, absent)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return lines, absent


def _contenders(
    setting: Setting, op: str, case: Case, dtype: str, absent: dict[str, str]
) -> list[_Contender]:
    """Those that run this case within bounds of error, ours first."""
    small = op_calls.reduced(case, setting.device)
    inputs = make(small, DTYPES[dtype], setting.device, seed=99)
    exact = op_calls.truth(op, inputs, DTYPES[dtype])
    plain = op_calls.errors(
        op_calls.values(_yardstick(op, small, setting.device), op, inputs), exact
    )
    found: list[_Contender] = []
    candidates: list[tuple[str, Peer | None]] = [
        (name, None) for name in setting.backends or (AUTO, *dispatch.BACKENDS[op])
    ]
    candidates += [
        (each.name, each)
        for each in peers(op, setting.peer_names)
        if setting.compiled_peers or not each.compiled or setting.peer_names
    ]
    for name, peer in candidates:
        if (
            peer is None
            and name.startswith("triton")
            and setting.versions.get("triton", "").endswith("(interpreter)")
        ):
            absent[name] = "Triton's interpreter runs it here: that takes no time worth telling"
            continue
        if peer is None and (
            reason := setting.refusal([op]) if name == AUTO else setting.refused.get((op, name))
        ):
            absent[name] = reason
            continue
        try:
            function = (
                op_calls.on_backend(op, "" if name == AUTO else name)
                if peer is None
                else peer.build(case, setting.device)
            )
            if isinstance(function, str):
                absent[name] = function
                continue
            errors, no_backward = (
                ({}, None) if peer and not peer.alike else _errors(function, op, inputs, exact)
            )
        except Exception as error:
            absent[name] = first_line(error)
            continue
        if peer is None and (reason := op_calls.red(errors, plain, DTYPES[dtype])):
            absent[name] = setting.refused[op, name] = reason
            setting.report(f"RED: {op} {name} on {case.name} {dtype}: {reason}; it is not timed")
            continue
        if peer is not None and peer.alike and not max(errors.values()) < 1:
            absent[name] = f"it computes something else: errors {errors}"
            continue
        found.append(_Contender(name, function, errors, peer, no_backward))
    return found


def _errors(
    function: Function, op: str, inputs: dict[str, Any], exact: op_calls.Values
) -> tuple[dict[str, float], str | None]:
    """Errors of outputs and gradients; where there is no backward those of the outputs, and why."""
    try:
        return op_calls.errors(op_calls.values(function, op, inputs), exact), None
    except Exception as error:
        with torch.no_grad():  # what fails here too is absent
            outputs = dict(zip(op_calls.COMPARED[op], function(**inputs), strict=True))
        return op_calls.errors(outputs, {name: exact[name] for name in outputs}), first_line(error)


def _yardstick(op: str, case: Case, device: torch.device) -> Function:
    """Plain torch in the same dtype."""
    name = {
        "attention": "eager",
        "drop_token": "gather",
        "contrastive_lse": "materialised",
        "patch_embed": "gather_first",
    }[op]
    function = peers(op, (name,))[0].build(case, device)
    assert not isinstance(function, str)
    return function


def _measure_mode(
    setting, op: str, case: Case, dtype: str, mode: Mode, contenders, absent
) -> list[Line]:
    sets = op_calls.input_sets(case, DTYPES[dtype], setting.device)
    calls: dict[str, list] = {}
    peaks: dict[
        str, tuple[int | None, int | None]
    ] = {}  # allocated by the call, held by the process
    for contender in contenders:
        if contender.no_backward and mode != "fwd":
            absent[f"{contender.name} {mode}"] = contender.no_backward
            continue
        try:
            calls[contender.name] = [
                op_calls.call(contender.function, op, inputs, mode) for inputs in sets
            ]
            calls[contender.name][0]()  # compiled and tuned outside the measurement
            trim_host_memory()  # of the contenders before
            resident = (
                peak_resident(calls[contender.name][0]) if setting.device.type == "cpu" else None
            )
            peak = (
                None if mode == "bwd" else peak_bytes(calls[contender.name][0], setting.device)
            )  # what the forward kept would be missing
            peaks[contender.name] = (peak, resident)
        except Exception as error:
            calls.pop(contender.name, None)
            absent[f"{contender.name} {mode}"] = first_line(error)
    ceilings = setting.ceilings_of(dtype)
    failed: dict[str, str] = {}
    races = {setting.clock: _race(setting, setting.clock, calls, failed)}
    if (
        failed and setting.clock == "cuda_graph"
    ):  # what cannot be captured is timed by events, and beside it whom it is compared with
        again = {
            name: calls[name]
            for name in (*failed, *_compared_with(failed, races[setting.clock], contenders))
        }
        failed.clear()
        races["cuda_events"] = _race(setting, "cuda_events", again, failed)
    absent |= {f"{name} {mode}": reason for name, reason in failed.items()}
    lines = []
    for contender in contenders:
        if found := [(clock, times) for clock, times in races.items() if contender.name in times]:
            clock, times = (
                found[0]
                if contender.peer
                else min(found, key=lambda each: _speedup(contender, each[1], contenders))
            )
            best = _best_peer(times, contenders)
            lines.append(
                _line(
                    setting,
                    op,
                    case,
                    dtype,
                    mode,
                    contender,
                    times,
                    clock,
                    peaks[contender.name],
                    best,
                    ceilings,
                )
            )
    return lines


def _race(
    setting: Setting, clock: str, calls: dict[str, list], failed: dict[str, str]
) -> dict[str, Timing]:
    return interleaved(
        calls,
        rounds=setting.rounds,
        warmup=setting.warmup,
        clock=setting.make_clock(clock),
        failed=failed,
        **setting.limits(),
    )


def _compared_with(
    failed: dict[str, str], times: dict[str, Timing], contenders: Sequence[_Contender]
) -> list[str]:
    """Of those that were timed: ours and the best peer, or all peers if one of ours is among ``failed``."""
    best = (
        None
        if any(each.peer is None and each.name in failed for each in contenders)
        else _best_peer(times, contenders)
    )
    return [
        each.name
        for each in contenders
        if each.name in times and (each.peer is None or best is None or each is best)
    ]


def _speedup(
    contender: _Contender, times: dict[str, Timing], contenders: Sequence[_Contender]
) -> float:
    """Over the best peer, by which of two clocks ours does worse; that one it is told by."""
    best = _best_peer(times, contenders)
    return times[contender.name].speedup_over(times[best.name]) if best else math.inf


def _best_peer(times: dict[str, Timing], contenders: Sequence[_Contender]) -> _Contender | None:
    theirs = [
        contender
        for contender in contenders
        if contender.peer and contender.peer.alike and contender.name in times
    ]
    return min(theirs, key=lambda contender: times[contender.name].p50, default=None)


def _line(
    setting,
    op,
    case,
    dtype,
    mode,
    contender,
    times,
    clock,
    peaks,
    best: _Contender | None,
    ceilings,
) -> Line:
    timing = times[contender.name]
    least = work(case, mode, DTYPES[dtype].itemsize)
    compute = least.bound(ceilings) == "compute"
    speed = least.flops / timing.p50 / 1e9 if compute else least.bytes / timing.p50 / 1e6
    error, error_of = op_calls.worst(contender.errors, mode) if contender.errors else (None, None)
    compared: dict[str, Any] = {}
    if contender.peer is None and best is not None:
        compared = dict(
            speedup_over_best_peer=timing.speedup_over(times[best.name]),
            best_peer=best.name,
            best_peer_ms_p50=times[best.name].p50,
            best_peer_error=op_calls.worst(best.errors, mode)[0],
        )
    return Line(
        op=op,
        case=case.name,
        dtype=dtype,
        mode=mode,
        backend=contender.name,
        ours=contender.peer is None,
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
        share_of_ceiling=speed / (ceilings.tflops if compute else ceilings.gb_per_s),
        error=error,
        error_of=error_of,
        error_batch=op_calls.reduced(case, setting.device).batch if contender.errors else None,
        device=setting.device_name,
        versions=setting.versions
        | machine.package_version(contender.peer.package if contender.peer else None),
        commit=machine.commit(),
        date=machine.today(),
        drop_rate=case.origin.drop_rate if case.origin else None,
        **compared,
    )


def describe(line: Line) -> str:
    """One line for the terminal."""
    speed = (
        f"{line.tflops:8.3f} TFLOP/s"
        if line.tflops is not None
        else f"{line.gb_per_s:8.2f} GB/s   "
    )
    ratio = ""
    if line.speedup_over_best_peer is not None:
        ratio = f"  {line.speedup_over_best_peer:.2f}x best peer ({line.best_peer} {line.best_peer_ms_p50:.4f} ms, error {line.best_peer_error:.1e})"
    error = (
        "another loss in the same role"
        if line.error is None
        else f"error {line.error:.1e} ({line.error_of})"
    )
    return (
        f"{line.op:11} {line.case:24} {line.dtype} {line.mode:7} {'*' if line.ours else ' '}{line.backend:26} {line.ms_p50:10.4f} ms "
        f"({line.ms_p20:.4f}..{line.ms_p80:.4f}) {speed} {line.share_of_ceiling:6.1%}  {error}"
        f"  peak {(line.peak_bytes or 0) / 2**20:8.1f} MiB  {line.clock}{ratio}"
    )


def main() -> int:
    # argparse, here and in the other commands: a machine lent for a measurement has torch, not necessarily the command line's extras
    parser = argparse.ArgumentParser(
        description="time an op's backends against its peers",
        epilog="python -m bench.floors lists the cases",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument(
        "--op", nargs="+", choices=dispatch.OPS, help="required on a GPU; all of them on the CPU"
    )
    parser.add_argument(
        "--case",
        nargs="+",
        help="names, primary, parity or cpu; primary on a GPU and cpu on the CPU unless given",
    )
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], help=DTYPE_HELP)
    parser.add_argument("--mode", nargs="+", default=["fwd", "fwd+bwd"], choices=MODES)
    parser.add_argument(
        "--backends", nargs="+", help="ours, auto among them; all of the op unless given"
    )
    parser.add_argument(
        "--peers", nargs="*", help="all of the op unless given; give none for ours alone"
    )
    parser.add_argument(
        "--no-compiled-peers", action="store_true", help="leave out peers under torch.compile"
    )
    parser.add_argument(
        "--clock", choices=["cuda_graph", "cuda_events", "perf_counter"], default=""
    )
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, help="of a case's rounds in a mode; two at least are run"
    )
    parser.add_argument("--batch", type=int, help="instead of the case's own")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the results hold for this code"
    )
    parser.add_argument(
        "--out",
        help="append result lines to this file; on the CPU bench/results/<processor>.jsonl unless given or contenders are chosen, '' for none",
    )
    given = parser.parse_args()
    cpu = given.device == "cpu"
    dtypes = given.dtype or [native_dtype(torch.device(given.device))]
    if not given.op and not cpu:
        parser.error("the following arguments are required: --op")
    status = 0
    for op in given.op or dispatch.OPS:
        # what a user gets, and those that it is chosen among; the others would only be refused one by one
        backends = given.backends or (
            [AUTO, *chosen_among(op, torch.device("cpu"))] if cpu else None
        )
        try:
            cases = select(op, given.case or ["cpu" if cpu else "primary"])
            setting = Setting(
                torch.device(given.device),
                clock=given.clock,
                rounds=given.rounds,
                seconds=given.seconds,
                backends=tuple(backends) if backends else None,
                peer_names=None if given.peers is None else tuple(given.peers),
                compiled_peers=not given.no_compiled_peers,
            )
            peers(op, setting.peer_names)
            if unknown := sorted(set(given.backends or ()) - {AUTO, *dispatch.BACKENDS[op]}):
                raise ValueError(
                    f"unknown backends {', '.join(unknown)}; {op} has {', '.join(dispatch.BACKENDS[op])}"
                )
        except ValueError as error:
            parser.error(str(error))
        if given.batch:
            cases = [at_batch(case, given.batch) for case in cases]
        partial = bool(given.backends or given.peers is not None or given.no_compiled_peers)
        out = _out(given.out, setting, partial)
        status |= _measure_all(setting, op, cases, dtypes, given.mode, out, given.resume)
    return status


def _out(asked: str | None, setting: Setting, partial: bool) -> str | Path | None:
    """The file that takes the lines; a CPU's are kept beside the code unless told otherwise, or among some contenders alone."""
    return (
        results.of_device(setting.device_name)
        if asked is None and setting.device.type == "cpu" and not partial
        else asked
    )


def _measure_all(
    setting: Setting,
    op: str,
    cases: Sequence[Case],
    dtypes: Sequence[str],
    modes: Sequence[Mode],
    out,
    resume: bool,
) -> int:
    """Print and keep the lines of an op; 1 where one of its backends is red."""
    for dtype in dtypes:
        left = [
            case
            for case in cases
            if not (resume and out and is_measured(setting, out, op, case, dtype, modes))
        ]
        if left:
            gate(setting, [op], dtype)
        for case in left:
            lines, absent = measure(setting, op, case, dtype, modes)
            for line in lines:
                print(describe(line), flush=True)
            for name, reason in absent.items():
                print(f"{op:11} {case.name:24} {dtype} absent: {name}: {reason}", flush=True)
            if out:
                results.append(out, lines)
    return int(
        any("red" in reason or "error beyond" in reason for reason in setting.refused.values())
    )


if __name__ == "__main__":
    keep_host_memory()
    raise SystemExit(main())
