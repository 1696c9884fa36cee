"""Everything that waits for a GPU, in stages of at most nine minutes each, into one folder.

    python -m bench gpu --out DIR                     # all stages, each within its budget
    python -m bench gpu --out DIR --stage ops         # one; called again it continues
    python -m bench gpu --out DIR --dry-run           # on the CPU, smallest cases, one round

parity  the battery's check on the device in every dtype, and pytest on it  -> parity.jsonl, .txt
tune    every candidate tile at the primary cases                           -> tuned/<arch>.json
ops     every op at its primary cases against its peers                     -> ops.jsonl
step    a whole training step at three drop rates                               -> step.jsonl
paper   the paper's configurations by drop rate, training and inference     -> paper.jsonl
scaling ops by size                                                         -> scaling.jsonl

A part that fails is reported in summary.md (and failures.jsonl) and the rest goes on. The exit
status is 1 where parity is red.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vatt_fast.kernels import backends
from vatt_fast.kernels.cases import CASES, Case, tag
from vatt_fast.kernels.ops import OPS

from . import lines, machine, sweeps, tune
from .floors import MODES, Mode
from .machine import ROOT
from .report import tables
from .setting import RED, Setting, is_measured, verdict_of
from .steps import OF_THE_PAPER
from .sweeps import Cell
from .timer import first_line

BUDGET_S = 540.0
_PRESET = "mbs"
_TESTED = ("fp32", "fp16", "bf16", "fp64")
_FILES = {
    "ops": "Ops",
    "step": "Training step",
    "paper": "The paper's configurations",
    "scaling": "Ops by size",
}
# what a dry run does instead: enough to pass every line of the logic
_DRY_CASES = {
    "attention": "one_query_one_key",
    "drop_token": "one_of_one",
    "contrastive_lse": "one_pair",
    "patch_embed": "one_patch",
}
_DRY_TUNED = ("drop_token", "contrastive_lse")  # in Triton's interpreter, one candidate each


@dataclasses.dataclass
class Run:
    """One invocation: where results go, how long a stage may take."""

    out: Path
    device: torch.device
    dry: bool
    budget: float
    began: float = 0.0

    @property
    def dtype(self) -> str:
        return "fp32" if self.dry else "bf16"

    @property
    def deadline(self) -> float:
        return self.began + self.budget

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def file(self, stage: str) -> Path:
        return self.out / f"{stage}.jsonl"

    def setting(self, **options) -> Setting:
        """What parity.jsonl does not show green on this commit and device may not be timed."""
        if self.dry:
            options |= dict(rounds=1, warmup=1, quick=True)
        if self.tuned():
            options["tiles"] = "tuned in this run"
        setting = Setting(
            self.device, deadline=self.deadline, compiled_peers=not self.dry, **options
        )
        verdicts = self.verdicts()
        for op, names in backends.BACKENDS.items():
            for name in names:
                setting.set_verdict(op, name, _refusal(verdicts.get((op, name), {})))
        return setting

    def tuned(self) -> tune.Table:
        """What the tune stage has written into the folder."""
        paths = sorted((self.out / "tuned").glob("*.json"))
        return tune.read_table(paths[0]) if len(paths) == 1 else {}

    @property
    def here(self) -> dict[str, object]:
        return {"commit": machine.commit(), "device": machine.name(self.device), "dry": self.dry}

    def verdicts(self) -> dict[tuple[str, str], dict[str, str | None]]:
        """{(op, backend): {dtype: why it is not green, or None}} on this commit and device."""
        found: dict[tuple[str, str], dict[str, str | None]] = {}
        for each in _records(self.file("parity")):
            if self.here.items() <= each.items():
                found.setdefault((each["op"], each["backend"]), {})[each["dtype"]] = each["reason"]
        return found

    def fail(self, stage: str, part: str, error: str) -> None:
        print(f"not done: {stage}: {part}: {error}", flush=True)
        _append(self.file("failures"), {"stage": stage, "part": part, "error": error})

    def forget_failures(self, stage: str) -> None:
        """A stage that runs again replaces its report."""
        kept = [each for each in self.failures() if each["stage"] != stage]
        self.file("failures").write_text("".join(json.dumps(each) + "\n" for each in kept))

    def failures(self) -> list[dict]:
        return _records(self.file("failures"))


def _refusal(by_dtype: dict[str, str | None]) -> str | None:
    """None where one dtype is green and none is red."""
    reasons = [why for why in by_dtype.values() if why]
    if red := [why for why in reasons if RED in why]:
        return red[0]
    if None in by_dtype.values():
        return None
    return reasons[0] if reasons else "its parity check did not run here"


def _records(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


# -- parity -----------------------------------------------------------------------------------


def parity_stage(run: Run) -> None:
    """The check of every backend and dtype, in processes side by side.

    Compiling kernels takes most of the time, and one process compiles on one core.
    """
    run.file("parity").unlink(missing_ok=True)
    if run.dry:
        for op, case in _DRY_CASES.items():
            for name in ("reference", "triton_gpu"):
                few = [CASES[op][case]]
                reason = verdict_of(op, name, run.dtype, run.device, cases=few)
                _note(run, op, name, run.dtype, reason)
        return
    jobs = [
        (op, name, dtype)
        for dtype in _TESTED
        for op, names in backends.BACKENDS.items()
        for name in names
    ]
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(verdict_of, *job, run.device, run.deadline): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            reason = f"{RED}: {first_line(error)}" if error else future.result()
            _note(run, *futures[future], reason)
    _pytest(run)


def _note(run: Run, op: str, backend: str, dtype: str, reason: str | None) -> None:
    what = {"op": op, "backend": backend, "dtype": dtype, "reason": reason}
    _append(run.file("parity"), run.here | what)
    print(f"{op} {backend} {dtype}: {reason or 'green'}", flush=True)
    if reason and "no parity case ran" not in reason:
        run.fail("parity", f"{op} {backend} {dtype}", reason)


def _pytest(run: Run) -> None:
    """What the check does not cover: the battery's properties, and the tests marked gpu."""
    parts = {
        "properties": ["tests/kernels/test_ops.py", "-k", "cuda and not test_gradients"],
        "marked gpu": ["tests", "-m", "gpu"],
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (run.out / "parity.txt").open("w") as file:
        for name, arguments in parts.items():
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
            print(f"== {name}", file=file, flush=True)
            try:
                timeout = max(1.0, run.left)
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=timeout
                )
            except subprocess.TimeoutExpired:
                run.fail("parity", name, "out of time")
                continue
            if done.returncode:
                run.fail("parity", name, f"pytest ended with {done.returncode}; see parity.txt")


# -- tune -------------------------------------------------------------------------------------


def tune_stage(run: Run) -> None:
    wanted = [each for each in _in_turn(run) if not run.dry or each[0] in _DRY_TUNED]
    path = run.out / "tuned" / f"{tune.arch()}.json"
    table = {} if run.dry else tune.read_table(tune.installed_path())
    table |= tune.read_table(path)
    setting = run.setting(rounds=20)
    for part, reason in tune.tune_cases(setting, wanted, run.dtype, path, table, few=run.dry):
        run.fail("tune", part, reason)


# -- ops and sizes ----------------------------------------------------------------------------


def ops_stage(run: Run) -> None:
    setting, out = run.setting(), run.file("ops")
    modes: Sequence[Mode] = ("fwd", "fwd+bwd") if run.dry else MODES
    for (op, backend), reason in setting.refused.items():
        run.fail("ops", f"{op}: {backend}", reason)
    wanted = [
        (op, case)
        for op, case in _in_turn(run)
        if not is_measured(setting, out, op, case, run.dtype, modes)
    ]
    for where, who, reason in sweeps.measure_cases(setting, wanted, run.dtype, modes, out)[1]:
        if (where.partition(" ")[0], who) not in setting.refused:
            run.fail("ops", f"{where}: {who}", reason)


def scaling_stage(run: Run) -> None:
    setting = run.setting()
    modes: list[Mode] = ["fwd"] if run.dry else ["fwd", "fwd+bwd"]
    for op, cases in sweeps.SIZES.items():
        sizes = [min(cases)] if run.dry else list(cases)
        out = run.file("scaling")
        for where, who, reason in sweeps.measure_sizes(
            setting, op, sizes, run.dtype, modes, out, longest=2.0, resume=True
        ):
            run.fail("scaling", f"{where}: {who}", reason)


def _in_turn(run: Run) -> list[tuple[str, Case]]:
    """(op, case): the first case of every op, then the second, ..."""
    queues = [[(op, case) for case in _cases(run, op)] for op in OPS]
    return [each for turn in itertools.zip_longest(*queues) for each in turn if each]


def _cases(run: Run, op: str) -> list[Case]:
    """What matters most first: 224 pixels, half dropped, the paper's main preset; tiny last."""
    if run.dry:
        return [CASES[op][_DRY_CASES[op]]]

    def rank(case: Case) -> tuple:
        origin = case.origin
        assert origin is not None
        drop_order = {0.5: 0, 0.0: 1, 0.75: 2}.get(origin.drop_rate, 3)
        tiny, main = "tiny" in origin.presets, "mbs" in origin.presets
        return tiny, drop_order, origin.pixels == 320, not main, case.name

    return sorted((case for case in CASES[op].values() if tag(case) == "primary"), key=rank)


# -- whole steps ------------------------------------------------------------------------------


def step_stage(run: Run) -> None:
    """What matters most first; the compiler's slowest setting last."""
    if run.dry:
        _measure_cells(run, "step", [Cell("tiny", 0.5, "fwd+bwd", 2)])
        return
    wanted = [Cell(_PRESET, rate, "fwd+bwd", 16, ("default",)) for rate in (0.5, 0.0, 0.75)]
    strongest = ("max-autotune-no-cudagraphs",)
    wanted.append(Cell(_PRESET, 0.5, "fwd+bwd", 16, strongest))
    _measure_cells(run, "step", wanted)


def paper_stage(run: Run) -> None:
    modes: list[Mode] = ["fwd+bwd", "fwd"]
    if run.dry:
        wanted = [Cell("tiny", 0.5, mode, 2) for mode in modes]
    else:  # compilation takes minutes: one rate of the main preset, when all else is there
        wanted = [
            Cell(name, rate, mode, 32 if name == "tiny" else 16)
            for name in OF_THE_PAPER
            for mode in modes
            for rate in sweeps.DROP_RATES
        ]
        wanted += [Cell("mbs_32x224x224", 0.5, mode, 16, ("default",)) for mode in modes]
    _measure_cells(run, "paper", wanted)


def _measure_cells(run: Run, stage: str, wanted: Sequence[Cell]) -> None:
    setting = run.setting(clock="perf_counter", rounds=7, warmup=1)
    if reason := setting.refusal():
        run.fail(stage, "all", reason)
        return
    out = run.file(stage)
    left = sweeps.unmeasured(wanted, run.dtype, out, setting)
    for where, who, reason in sweeps.measure_cells(setting, left, run.dtype, out):
        run.fail(stage, f"{where}: {who}", reason)


# -- summary ----------------------------------------------------------------------------------


def summarise(run: Run) -> str:
    """Markdown of what the folder holds."""
    versions = ", ".join(f"{k} {v}" for k, v in machine.versions(run.device).items())
    title = "# GPU run"
    if run.dry:
        title = "# Dry run on the CPU: it shows that the stages work, its times mean nothing"
    told = [title, "", f"{machine.name(run.device)}; {versions}; commit {machine.commit()}", ""]
    verdicts = [
        (op, backend, dtype, reason or "green")
        for (op, backend), by_dtype in sorted(run.verdicts().items())
        for dtype, reason in by_dtype.items()
    ]
    table = lines.markdown_table(("op", "backend", "dtype", "verdict"), verdicts)
    told += ["## Parity", "", table]
    told += ["", "## Tuned tables", ""]
    for path in sorted((run.out / "tuned").glob("*.json")):
        tuned = sorted(tune.read_table(path).items())
        kernels = ", ".join(f"{kernel} ({len(entries)})" for kernel, entries in tuned)
        told.append(f"- {path.name}: {kernels}")
    for stage, title in _FILES.items():
        told += ["", f"## {title}", ""]
        if measured := lines.read(run.file(stage)):
            told.append(tables.every_line(tables.current(measured)))
    told += ["", "## What did not run or failed", ""]
    told += _grouped(run.failures()) or ["Nothing."]
    return "\n".join(told) + "\n"


def _grouped(failures: list[dict[str, str]]) -> list[str]:
    """One line for one reason: "op case: contender" fails the same way at many cases."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in failures:
        where, _, who = each["part"].rpartition(": ")
        groups.setdefault((each["stage"], who, each["error"]), []).append(where)
    told = []
    for (stage, who, error), places in groups.items():
        at = f" at {places[0]}" if places[0] else ""
        if len(places) > 1:
            at = f" at {len(places)} cases, {places[0]} first"
        told.append(f"- {stage}: {who}{at}: {error}")
    return told


STAGES: dict[str, Callable[[Run], None]] = {
    "parity": parity_stage,
    "tune": tune_stage,
    "ops": ops_stage,
    "step": step_stage,
    "paper": paper_stage,
    "scaling": scaling_stage,
}


def main(run: Run, stages: Sequence[str]) -> int:
    """Run the stages in their order; 1 where parity is red."""
    run.out.mkdir(parents=True, exist_ok=True)
    for stage in (each for each in STAGES if each in stages):
        run.began = time.monotonic()
        run.forget_failures(stage)
        print(f"== {stage}, at most {run.budget:.0f} s", flush=True)
        try:
            table = run.tuned() if stage not in ("parity", "tune") else {}
            with tune.applied(table) if table else contextlib.nullcontext():
                STAGES[stage](run)
        except Exception as error:
            run.fail(stage, "the whole stage", first_line(error))
        print(f"== {stage} took {time.monotonic() - run.began:.0f} s", flush=True)
        (run.out / "summary.md").write_text(summarise(run))
    return int(any(each["stage"] == "parity" for each in run.failures()))
