"""Our ops inside other libraries, held against the libraries' own paths: errors, time, memory.

    python -m bench integrations                              the errors, as a Markdown table
    python -m bench integrations --speed 15 --memory 8192     beside them time and peak memory

Models are small and of random weights, and of a real size for time and memory. An error is
||ours - theirs|| / ||theirs||, of the output and of all gradients as one vector; "max" is the
greatest difference of a value, of the largest one of its kind. What bf16 itself costs the library
stands beside it: its own bf16 path against its fp32 path. Time is that of interleaved rounds.
Memory is what one forward and backward add to the peak of a process of its own; losses have the
batch that is given. What does not run here is left out, with the reason.
"""

import functools
import multiprocessing
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.integration_cases import CASES, Case, missing
from bench.timer import peak_resident


class Errors(NamedTuple):
    """Of ours against theirs; ``greatest`` of a single value."""

    output: float
    gradients: float
    greatest: float


def relative(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm())


def errors(case: Case, dtype: torch.dtype) -> Errors:
    ours, theirs = case.run(dtype, True), case.run(dtype, False)
    pairs = list(zip(ours, theirs, strict=True))
    greatest = max(float((x.double() - y.double()).abs().max() / y.abs().max()) for x, y in pairs)
    output, gradients = (relative(x, y) for x, y in pairs)
    return Errors(output, gradients, greatest)


def rounding(case: Case) -> tuple[float, float]:
    """Of the library's bf16 against its fp32: (output, gradients)."""
    half, full = case.run(torch.bfloat16, False), case.run(torch.float32, False)
    return relative(half.value, full.value), relative(half.gradient, full.gradient)


def time_ratio(case: Case, rounds: int) -> float:
    """Of ours against theirs, fp32: the median ratio of rounds, each of both in turn."""
    steps = [case.prepare_real(torch.float32, ours) for ours in (True, False)]
    ratios = []
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            steps[place]()
            seconds[place] = time.perf_counter() - start
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round warms up


def table(rounds: int = 0, batch: int | None = None, ours_alone: bool = False) -> str:
    """Of all cases, as Markdown.

    Args:
        rounds: of timing; 0 leaves its column out.
        batch: of the losses, whose memory is measured; None leaves its columns out.
        ours_alone: leave the libraries' own memory out.
    """
    names = ["library", "case"]
    names += [f"{dtype} {kind}" for dtype in ("fp32", "bf16") for kind in _KINDS]
    names += ["bf16 itself"] + ["time, ours / theirs"] * (rounds > 0)
    names += ["ours, MiB", "theirs, MiB"] * (batch is not None)
    lines, without = [_row(names), "|---" * len(names) + "|"], []
    for case in CASES:
        if reason := case.absent():
            without.append(reason)
            continue
        cells = [case.library, case.name]
        for dtype in (torch.float32, torch.bfloat16):
            cells += [f"{error:.1e}" for error in errors(case, dtype)]
        cells.append(" / ".join(f"{error:.1e}" for error in rounding(case)))
        if rounds:
            cells.append(f"{time_ratio(case, rounds):.2f}")
        if batch is not None:
            cells.append(_measured(case, True, batch))
            cells.append("not run" if ours_alone else _measured(case, False, batch))
        lines.append(_row(cells))
    return "\n".join([*lines, *(f"\n{reason}" for reason in dict.fromkeys(without))])


_KINDS = ("output", "gradients", "max")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- memory ------------------------------------------------------------------------------------

_DIM = 256


def _peak(path: list[str], number: int, ours: bool, batch: int, send: Any) -> None:
    """MiB that one forward and backward of a real size add to what a small one needs."""
    sys.path[:] = path
    case = CASES[number]
    missing(case.library)  # imports it as the parent did
    warnings.simplefilter("ignore")
    if case.prepare_batch is None:
        small, real = (
            functools.partial(f, torch.float32, ours) for f in (case.prepare, case.prepare_real)
        )
    else:
        small, real = (
            functools.partial(case.prepare_batch, torch.float32, ours, rows=rows, dim=_DIM)
            for rows in (64, batch)
        )
    small()()
    # not getrusage's, which a process begins with at its parent's
    before, peak = peak_resident(lambda: None), peak_resident(lambda: real()())
    send.send(None if before is None or peak is None else (peak - before) / 2**20)


def _measured(case: Case, ours: bool, batch: int) -> str:
    if case.on_cuda:
        return "not measured"
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    given = (sys.path, CASES.index(case), ours, batch, send)
    process = context.Process(target=_peak, args=given)
    process.start()
    send.close()
    try:
        mebibytes = receive.recv()
        return "not told" if mebibytes is None else f"{mebibytes:.0f}"
    except EOFError:
        return "died"
    finally:
        process.join()


def run(batch: int | None, rounds: int, ours_alone: bool, packages: Path | None) -> int:
    """Print the table; its columns of memory, with a batch for the losses, and of time if asked.

    Args:
        rounds: of time; 0 leaves its column out.
        ours_alone: of the memory.
        packages: a folder of packages, which are tried first.
    """
    if packages:
        sys.path.insert(0, str(packages))
    print(table(rounds, batch, ours_alone))
    return 0
