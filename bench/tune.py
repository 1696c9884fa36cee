"""Time every candidate tile of the Triton kernels at the primary cases: an architecture's table.

A backend's ``TUNING`` names its kernels and their candidates. While a case runs, ``tiles.choose``
is overheard to learn under which keys each kernel looks itself up; then each candidate is forced in
turn. One that fails to compile, wants more than the device has or changes the result is left out
and counted; so is one whose code spills or lets its products wait for one another, before it is
timed. Nothing here runs in production: the table is a file.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from vatt_fast.kernels import backends, parity, settings, tiles
from vatt_fast.kernels.cases import Case, make
from vatt_fast.kernels.tiles import Tiles

from . import calls
from .floors import Mode
from .machine import DTYPES, GPUS
from .setting import Setting
from .timer import Call, Clock, first_line, interleaved, side_stream

Table = dict[str, dict[str, Tiles]]
# op, case, dtype, mode, tiles by kernel -> why each is not worth a timing, or None
Refusals = Callable[[str, str, str, Mode, Sequence[dict[str, Tiles]]], list[str | None]]
# the kernel's own heuristic stays unless a candidate needs less than this share of its time
_MARGIN = 0.99
BACKEND = "triton_gpu"


class Request(NamedTuple):
    """What a kernel asked ``tiles.choose`` for, and the answer without a table."""

    kernel: str
    key: str
    heuristic: tuple[tuple[str, int], ...]


@contextlib.contextmanager
def overheard() -> Iterator[list[Request]]:
    """Requests to ``tiles.choose`` while the block runs, each once."""
    requests: dict[Request, None] = {}
    original = tiles.choose

    def choose(kernel: str, arch: str, dtype: torch.dtype, heuristic: Tiles, **shape: int) -> Tiles:
        requests[Request(kernel, tiles.key(dtype, **shape), tuple(heuristic.items()))] = None
        return original(kernel, arch, dtype, heuristic, **shape)

    found: list[Request] = []
    tiles.choose = choose  # backends look it up in the module at every call
    tiles.forget()  # unless they remember its answer
    try:
        yield found
    finally:
        tiles.choose = original
        found += requests


def tune_case(
    op: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    candidates_of: dict[str, list[Tiles]],
    table: Table,
    clock: Clock,
    rounds: int,
    skipped: Counter,
    function: Callable | None = None,
    deadline: float | None = None,
    refusals: Refusals | None = None,
) -> None:
    """Add to ``table`` the fastest tiles of every kernel that the case runs under a new key.

    Args:
        candidates_of: a backend's TUNING. function: the op on that backend; None is ``triton_gpu``.
        skipped: counts candidates left out, by reason.
        deadline: time.monotonic() after which no further kernel is begun.
        refusals: leaves candidates out by their compiled code; None: all are timed.
    """
    function = calls.on_backend(op, BACKEND) if function is None else function
    inputs = make(case, dtype, device)
    sets = calls.input_sets(case, dtype, device)
    name = next(name for name, each in DTYPES.items() if each == dtype)
    best: dict[str, Tiles] = {}
    planned = {kernel for kernel, each in candidates_of.items() if any(map(_is_plan, each))}
    modes: tuple[Mode, ...] = ("fwd", "bwd")
    for mode in modes:
        refuse = refusals and functools.partial(refusals, op, case.name, name, mode)
        work = _Work(op, function, inputs, sets, mode, dtype, clock, rounds, skipped, refuse)
        under = _requests(work, candidates_of)
        # a plan decides which kernels run at all: so first the kernels, each under the plan that
        # runs it, then the plans between their bests
        for kernel in sorted(under, key=lambda kernel: kernel in planned):
            plan, asked = under[kernel]
            known = table.get(kernel, {})
            if kernel in best or all(request.key in known for request in asked):
                best.setdefault(kernel, known.get(asked[0].key, dict(asked[0].heuristic)))
                continue
            if deadline is not None and time.monotonic() > deadline:
                print(f"{op} {case.name}: out of time before {kernel}")
                return
            # without an entry the kernel's heuristic answers, and is a candidate like the others
            options = [dict(asked[0].heuristic), *candidates_of[kernel]]
            found = _fastest(work, kernel, options, {**best, **plan})
            if found is not None:
                best[kernel] = found
                for request in asked:
                    table.setdefault(kernel, {}).setdefault(request.key, found)


def tune_cases(
    setting: Setting,
    wanted: Sequence[tuple[str, Case]],
    dtype: str,
    path: Path,
    table: Table,
    *,
    few: bool = False,
    refusals: Refusals | None = None,
) -> list[tuple[str, str]]:
    """Tune ops at cases and write the table to ``path`` after each; (what was not tuned, why).

    Args:
        table: its entries are not measured again.
        few: one candidate a kernel: exercises the code.
        refusals: see ``tune_case``.
    """
    skipped = Counter[str]()
    missing: dict[str, str] = {}
    out_of_time = "out of time; run it again to continue"
    for op, case in wanted:
        module, title = tunable(op), f"{op} {case.name}"
        if module is None or (op, BACKEND) in setting.refused:
            missing[op] = setting.refused.get((op, BACKEND), "no Triton backend with candidates")
            continue
        if setting.out_of_time:
            missing[title] = out_of_time
            continue
        candidates = {kernel: each[: 1 if few else None] for kernel, each in module.TUNING.items()}
        options: dict[str, Any] = dict(candidates_of=candidates, table=table, refusals=refusals)
        options |= dict(rounds=setting.rounds, skipped=skipped, deadline=setting.deadline)
        print(title, flush=True)
        try:
            with side_stream(setting.device):
                what = (op, case, DTYPES[dtype], setting.device)
                tune_case(*what, clock=setting.make_clock(), **options)
            if setting.out_of_time:
                missing[title] = out_of_time
        except Exception as error:
            missing[title] = first_line(error)
        if table:
            write_table(path, table)
    print(f"candidates left out: {dict(skipped) or 'none'}")
    return list(missing.items())


class _Work(NamedTuple):
    """What is run while one mode of a case is tuned."""

    op: str
    function: Callable
    inputs: dict[str, Any]
    sets: list[dict[str, Any]]
    mode: Mode
    dtype: torch.dtype
    clock: Clock
    rounds: int
    skipped: Counter
    refuse: Callable[[Sequence[dict[str, Tiles]]], list[str | None]] | None


def _is_plan(candidate: Tiles) -> bool:
    """A choice between ways to compute, without a kernel of its own: {"ONE_PASS": 0}."""
    return "num_warps" not in candidate


def _requests(
    work: _Work, candidates_of: dict[str, list[Tiles]]
) -> dict[str, tuple[dict[str, Tiles], list[Request]]]:
    """{kernel: (plan to force so that it runs, its requests)}, without a plan and under each."""
    every = [(kernel, each) for kernel, options in candidates_of.items() for each in options]
    plans: list[dict[str, Tiles]] = [
        {},
        *({kernel: each} for kernel, each in every if _is_plan(each)),
    ]
    found: dict[str, tuple[dict[str, Tiles], list[Request]]] = {}
    for plan in plans:
        try:
            with settings.force_tiles(**plan):
                # bwd: its forward is not overheard
                call = calls.call(work.function, work.op, work.inputs, work.mode)
                with overheard() as requests:
                    call()
        except Exception as error:
            if not plan:
                raise
            work.skipped[type(error).__name__] += 1
            continue
        for kernel in dict.fromkeys(request.kernel for request in requests):
            if kernel in candidates_of and kernel not in found:
                found[kernel] = plan, [each for each in requests if each.kernel == kernel]
    return found


def _fastest(
    work: _Work, kernel: str, options: list[Tiles], others: dict[str, Tiles]
) -> Tiles | None:
    """The fastest of a kernel's options while other kernels run with their bests.

    The first option is the kernel's heuristic. None: no option ran.
    """
    ready: dict[str, list[Call]] = {}
    named = {json.dumps(each, sort_keys=True): each for each in options}  # each once
    expected: dict[str, torch.Tensor] | None = None
    chosen = {name: others | {kernel: option} for name, option in named.items()}
    reasons = work.refuse([*chosen.values()]) if work.refuse else [None] * len(chosen)
    for (name, choices), reason in zip(chosen.items(), reasons, strict=True):
        if reason:
            work.skipped["code"] += 1
            print(f"  {kernel} {name}: {reason}")
            continue
        try:
            with settings.force_tiles(**choices):
                found = calls.values(work.function, work.op, work.inputs)
                if expected is None:  # of the heuristic, which the parity check has seen
                    expected = {key: value.double() for key, value in found.items()}
                errors = parity.errors(found, expected)
                if not max(errors.values()) <= 2 * torch.finfo(work.dtype).eps:
                    work.skipped["changes the result"] += 1
                    continue
                ready[name] = [
                    under(choices, calls.call(work.function, work.op, each, work.mode))
                    for each in work.sets
                ]
        except Exception as error:
            work.skipped[type(error).__name__] += 1
            print(f"  {kernel} {name}: {first_line(error)}")
    failed: dict[str, str] = {}
    times = interleaved(ready, rounds=work.rounds, warmup=2, clock=work.clock, failed=failed)
    work.skipped.update(reason.partition(":")[0] for reason in failed.values())
    if not times:
        return None
    best = min(times, key=lambda name: times[name].p50)
    heuristic = next(iter(named))
    if heuristic in times:
        if times[best].p50 > _MARGIN * times[heuristic].p50:
            best = heuristic
        print(
            f"  {kernel}: {best} {times[best].p50:.4f} ms, "
            f"heuristic {times[heuristic].p50:.4f} ms, {len(times)} candidates"
        )
    return named[best]


def under(choices: dict[str, Tiles], call: Call) -> Call:
    """The call with these tiles, by kernel."""

    def run() -> Any:
        with settings.force_tiles(**choices):
            return call()

    return run


@contextlib.contextmanager
def compiled_first(pool: Any) -> Iterator[Refusals | None]:
    """Candidates compiled for this device on all cores of a ``multiprocessing.Pool``.

    None where the compilers' output is not read: all candidates are timed.
    """

    def refusals(op, case, dtype, mode, choices):
        jobs = [(op, case, dtype, arch(), mode, each) for each in choices]
        return pool.starmap(_refusal, jobs, chunksize=1)

    with pool:
        yield refusals if arch() in GPUS else None


def _refusal(*job) -> str | None:
    from .compile_gpu import refusal  # needs Triton, compiling

    return refusal(*job)


def workers() -> Any:
    """Processes beside this one, on all cores but one: a process compiles on one."""
    count = max(1, (os.cpu_count() or 2) - 1)
    return multiprocessing.get_context("spawn").Pool(count)


def tunable(op: str) -> ModuleType | None:
    """The op's Triton backend where it has one with candidates."""
    if BACKEND not in backends.BACKENDS[op]:
        return None
    try:
        module = backends.load(op, BACKEND)
    except ModuleNotFoundError:
        return None
    return module if getattr(module, "TUNING", None) else None


def read_table(path: str | Path) -> Table:
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def write_table(path: str | Path, table: Table) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def applied(table: Table) -> Iterator[None]:
    """Kernels take this table for the device's while the block runs, before it is installed."""
    original = tiles.table
    tiles.table = lambda arch: table
    tiles.forget()
    try:
        yield
    finally:
        tiles.table = original
        tiles.forget()


@functools.cache
def arch() -> str:
    from vatt_fast.kernels.triton_common import arch as of_triton

    return of_triton()


def installed_path() -> Path:
    """Where the kernels look for the table of this device's architecture."""
    return Path(tiles.__file__).parent / "tiles" / f"{arch()}.json"
