"""``python -m bench.gpu --out DIR``: everything that waits for a GPU, in stages of at most nine minutes each.

    python -m bench.gpu --out DIR                     # all stages, each within its budget
    python -m bench.gpu --out DIR --stage ops         # one; called again it continues with the cases that have no line yet
    python -m bench.gpu --out DIR --dry-run           # the same logic on the CPU, smallest cases, one round

parity  the op tests on the device, bf16 included, and the tests marked gpu           -> parity.txt
tune    every candidate tile at the primary cases                                     -> tuned/<arch>.json
ops     every op at its primary cases against its peers, interleaved                  -> ops.jsonl
step    the whole training step at three drop rates, with and without features        -> step.jsonl
paper   the paper's configurations by drop rate, training and inference               -> paper.jsonl
scaling ops by size                                                                   -> scaling.jsonl

A part that fails is reported in summary.md (and failures.jsonl) and the rest goes on. The exit status is 1 where parity is red.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from vatt_fast.config import preset
from vatt_fast.kernels import dispatch
from vatt_fast.kernels.cases import CASES, Case, tag

from . import drop_rate, machine, parity, results, scaling, step, tune
from .floors import Mode
from .machine import DTYPES
from .run import describe, measure
from .setting import Setting
from .timer import first_line, side_stream

STAGES = ("parity", "tune", "ops", "step", "paper", "scaling")
BUDGET_S = 540.0
_PARITY, _FAILURES = "parity.txt", "failures.jsonl"
_OPS, _STEP, _PAPER, _SCALING = "ops.jsonl", "step.jsonl", "paper.jsonl", "scaling.jsonl"
_TESTED = ("fp32", "fp16", "bf16", "fp64")

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
    preset: str
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

    def setting(self, **options) -> Setting:
        options = (
            dict(rounds=1 if self.dry else 0, warmup=1 if self.dry else 3, quick_ceilings=self.dry)
            | options
        )
        options |= dict(tiles="tuned in this run") if self.tuned() else {}
        setting = Setting(
            self.device, deadline=self.deadline, compiled_peers=not self.dry, **options
        )
        self._refuse(setting)
        return setting

    def _refuse(self, setting: Setting) -> None:
        """What parity.txt does not show green on this commit and device may not be timed."""
        found = self.parity()
        for op in dispatch.OPS:
            for backend in dispatch.BACKENDS[op]:
                setting.set_verdict(op, backend, parity.objection(found, op, backend))

    def tuned(self) -> tune.Table:
        """What the tune stage has written into the folder."""
        paths = sorted((self.out / "tuned").glob("*.json"))
        return tune.read_table(paths[0]) if len(paths) == 1 else {}

    def parity(self) -> dict[tuple[str, str], dict[str, int]]:
        path = self.out / _PARITY
        if not path.exists():
            return {}
        text = path.read_text()
        return parity.counts(text) if text.startswith(self.heading()) else {}

    def heading(self) -> str:
        return f"commit {machine.commit()}, {machine.name(self.device)}{', dry run' if self.dry else ''}\n"

    def fail(self, stage: str, part: str, error: str) -> None:
        print(f"not done: {stage}: {part}: {error}", flush=True)
        with (self.out / _FAILURES).open("a") as file:
            file.write(json.dumps({"stage": stage, "part": part, "error": error}) + "\n")

    def forget_failures(self, stage: str) -> None:
        """A stage that runs again replaces its report."""
        kept = [each for each in self.failures() if each["stage"] != stage]
        (self.out / _FAILURES).write_text("".join(json.dumps(each) + "\n" for each in kept))

    def failures(self) -> list[dict[str, str]]:
        path = self.out / _FAILURES
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- parity ------------------------------------------------------------------------------------------------------------


def parity_stage(run: Run) -> None:
    """The battery in shards side by side: compiling kernels takes most of its time, and one process compiles on one core."""
    shards = _shards(run)
    path = run.out / _PARITY
    path.write_text(run.heading())
    workers = 1 if run.dry else max(1, min(len(shards), (os.cpu_count() or 2) - 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, path.open("a") as file:
        futures = {pool.submit(_pytest, arguments, run): name for name, arguments in shards.items()}
        for future in concurrent.futures.as_completed(futures):
            name = futures[future]
            status, output = future.result()
            file.write(f"\n== {name}: exit status {status}\n{output}")
            file.flush()
            if status not in (0, 5):  # 5: nothing selected
                run.fail(
                    "parity",
                    name,
                    "out of time" if status == -1 else f"pytest ended with {status}; see {_PARITY}",
                )
            print(
                f"{name}: {output.strip().splitlines()[-1] if output.strip() else 'no output'}",
                flush=True,
            )
    for (op, backend), verdict in sorted(run.parity().items()):
        print(f"{op} {backend}: {verdict['passed']} passed, {verdict['failed']} failed", flush=True)


def _pytest(arguments: list[str], run: Run) -> tuple[int, str]:
    if run.left < 1:
        return -1, "not begun"
    return parity.pytest(arguments, run.device.type, timeout=run.left)


def _shards(run: Run) -> dict[str, list[str]]:
    """{name: pytest's arguments}. On a GPU the battery's rows on the CPU are left to CI."""
    file = "tests/kernels/test_ops.py"
    if run.dry:
        named = " or ".join(f"[{op}-reference-{case}-fp32]" for op, case in _DRY_CASES.items())
        named += " or " + " or ".join(
            f"[{op}-triton_gpu-{case}-fp32]" for op, case in _DRY_CASES.items()
        )
        return {"battery": [file, "-k", f"test_gradients and ({named})"]}
    shards = {}
    for op in dispatch.OPS:
        own = f"[{op}- and -cuda"
        for dtype in _TESTED:
            shards[f"{op} {dtype}"] = [file, "-k", f"{own}-{dtype}]"]
        shards[f"{op} properties"] = [
            file,
            "-k",
            " and ".join([own, *(f"not -{dtype}]" for dtype in _TESTED)]),
        ]
    shards["further properties"] = [file, "-k", " and ".join(f"not [{op}-" for op in dispatch.OPS)]
    shards["marked gpu"] = ["tests", "-m", "gpu"]
    return shards


# -- tune --------------------------------------------------------------------------------------------------------------


def tune_stage(run: Run) -> None:
    setting = run.setting(rounds=1 if run.dry else 20)
    modules = {}
    for op in _DRY_TUNED if run.dry else dispatch.OPS:
        module = tune.tunable(op)
        reason = (
            "no Triton backend with candidates"
            if module is None
            else setting.refused.get((op, "triton_gpu"))
        )
        if module is None or reason:
            run.fail("tune", op, reason or "")
        else:
            modules[op] = (
                {kernel: tiles[:1] for kernel, tiles in module.TUNING.items()}
                if run.dry
                else module.TUNING
            )
    if not modules:
        return
    path = run.out / "tuned" / f"{tune.arch()}.json"
    installed = {} if run.dry else tune.read_table(tune.installed_path())
    table = installed | tune.read_table(path)  # entries that are there are not measured again
    skipped = Counter[str]()
    for op, case in _in_turn(run):
        if op not in modules:
            continue
        if run.left < 0:
            run.fail("tune", f"{case.name}: {op}", "out of time; run the stage again to continue")
            continue
        try:
            with side_stream(run.device):
                tune.tune_case(
                    op,
                    case,
                    DTYPES[run.dtype],
                    run.device,
                    candidates_of=modules[op],
                    table=table,
                    clock=setting.make_clock(),
                    rounds=setting.rounds,
                    skipped=skipped,
                    deadline=run.deadline,
                )
        except Exception as error:
            run.fail("tune", f"{op} {case.name}", first_line(error))
        if table:
            tune.write_table(path, table)
    if skipped:
        run.fail(
            "tune",
            "candidates left out",
            ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items())),
        )


# -- ops ---------------------------------------------------------------------------------------------------------------


def ops_stage(run: Run) -> None:
    setting = run.setting()
    path = run.out / _OPS
    done = {
        (line.op, line.case, line.dtype, line.mode)
        for line in results.read(path)
        if line.commit == machine.commit()
    }
    modes: tuple[Mode, ...] = ("fwd", "fwd+bwd") if run.dry else ("fwd", "bwd", "fwd+bwd")
    for (op, backend), reason in setting.refused.items():
        run.fail("ops", f"{op} {backend}", reason)
    for op, case in _in_turn(run):
        missing = [mode for mode in modes if (op, case.name, run.dtype, mode) not in done]
        if not missing:
            continue
        if run.left < 0:
            run.fail("ops", f"{case.name}: {op}", "out of time; run the stage again to continue")
            continue
        try:
            lines, absent = measure(setting, op, case, run.dtype, missing)
        except Exception as error:
            run.fail("ops", f"{op} {case.name}", first_line(error))
            continue
        results.append(path, lines)
        for line in lines:
            print(describe(line), flush=True)
        for name, reason in absent.items():
            if name not in {backend for of_op, backend in setting.refused if of_op == op}:
                run.fail("ops", f"{op} {case.name}: {name}", reason)


def _in_turn(run: Run) -> list[tuple[str, Case]]:
    """(op, case): the first case of every op, then the second, ..."""
    queues = {op: _cases(run, op) for op in dispatch.OPS}
    return [
        (op, queue[i])
        for i in range(max(map(len, queues.values())))
        for op, queue in queues.items()
        if i < len(queue)
    ]


def _cases(run: Run, op: str) -> list[Case]:
    """What matters most first: 224 pixels and drop rate 0.5 of the paper's main preset, tiny last."""
    if run.dry:
        return [CASES[op][_DRY_CASES[op]]]

    def rank(case: Case) -> tuple:
        origin = case.origin
        assert origin is not None
        drop_order = {0.5: 0, 0.0: 1, 0.75: 2}.get(origin.drop_rate, 3)
        return (
            "tiny" in origin.presets,
            drop_order,
            origin.pixels == 320,
            "mbs" not in origin.presets,
            case.name,
        )

    return sorted((case for case in CASES[op].values() if tag(case) == "primary"), key=rank)


# -- step --------------------------------------------------------------------------------------------------------------


def _step_setting(run: Run, stage: str) -> Setting | None:
    """Of whole steps, which run whatever dispatch chooses; None while any of it is red."""
    setting = run.setting(clock="perf_counter", rounds=1 if run.dry else 7, warmup=1)
    reason = setting.refusal()
    if reason:
        run.fail(stage, "all", reason)
    return None if reason else setting


def step_stage(run: Run) -> None:
    setting = _step_setting(run, "step")
    if setting is None:
        return
    path = run.out / _STEP
    done = {
        (line.case, line.backend) for line in results.read(path) if line.commit == machine.commit()
    }
    name = "tiny" if run.dry else run.preset
    trainer = step.Trainer(preset(name), 1, 0.5, run.device, DTYPES[run.dtype])
    for rate, features, contenders in _steps(run.dry):
        title = f"{name}_drop{round(100 * rate)}, {'features' if features else 'AGG only'}, {', '.join(c.describe() for c in contenders)}"
        if any(
            _is_step(case, name, rate, features) and backend in {c.describe() for c in contenders}
            for case, backend in done
        ):
            continue
        if run.left < 0:
            run.fail("step", title, "out of time; run the stage again to continue")
            continue
        try:
            fitted = [
                each for each in contenders if each.name != "reference"
            ]  # it stores every score: nobody's choice, so it sets no batch
            batch = 2 if run.dry else step.fitting_batch(trainer, rate, 256, features, fitted)
            lines, absent = step.measure_step(
                setting, trainer, name, batch, rate, contenders, features=features
            )
        except Exception as error:
            run.fail("step", title, first_line(error))
            continue
        results.append(path, lines)
        for line in lines:
            print(step.describe(line), flush=True)
        for contender, reason in absent.items():
            run.fail("step", f"{title}: {contender}", reason)


def _steps(dry: bool) -> list[tuple[float, bool, list[step.Formulation]]]:
    """(drop rate, with features, contenders), what matters most first; the compiler's slowest setting last."""
    if dry:
        return [(0.5, False, step.formulations(("auto", "plain"), ()))]
    contenders = [
        *step.formulations(("auto", "plain"), ("default",)),
        *step.formulations(("reference",), ()),
    ]
    strongest = [
        each
        for each in step.formulations(("auto", "plain"), ("max-autotune-no-cudagraphs",))
        if each.compile
    ]
    common = [
        (rate, features, contenders) for features in (False, True) for rate in (0.5, 0.0, 0.75)
    ]
    return [*common, (0.5, False, strongest)]


def _is_step(case: str, name: str, rate: float, features: bool) -> bool:
    return (
        case.startswith(f"{name}_drop{round(100 * rate)}_b")
        and case.endswith("_features") == features
    )


# -- the paper's configurations, and sizes -----------------------------------------------------------------------------


def paper_stage(run: Run) -> None:
    setting = _step_setting(run, "paper")
    if setting is None:
        return
    modes: list[Mode] = ["fwd+bwd", "fwd"]
    if run.dry:
        wanted = drop_rate.cells(["tiny"], modes, [0.5], batch=2, compiled_at=[], cuda=False)
    else:  # compilation takes minutes: one rate of the main preset, when all else is there
        wanted = drop_rate.cells(
            list(drop_rate.CONFIGURATIONS),
            modes,
            drop_rate.DROP_RATES,
            batch=None,
            compiled_at=[],
            cuda=True,
        )
        wanted += drop_rate.cells(
            ["mbs_32x224x224"], modes, [0.5], batch=None, compiled_at=[0.5], cuda=True
        )
    out = run.out / _PAPER
    left = drop_rate.unmeasured(wanted, run.dtype, out, setting.device_name)
    for where, who, reason in drop_rate.measure_all(setting, left, run.dtype, out):
        run.fail("paper", f"{where}: {who}", reason)


def scaling_stage(run: Run) -> None:
    setting = run.setting()
    modes: list[Mode] = ["fwd"] if run.dry else ["fwd", "fwd+bwd"]
    for op, cases in scaling.CASES.items():
        sizes = [min(cases)] if run.dry else list(cases)
        absent = scaling.measure_op(
            setting, op, sizes, run.dtype, modes, run.out / _SCALING, longest=2.0, resume=True
        )
        for where, who, reason in absent:
            run.fail("scaling", f"{where}: {who}", reason)


# -- summary -----------------------------------------------------------------------------------------------------------


def summarise(run: Run) -> str:
    """Markdown of what the folder holds."""
    setting = f"{machine.name(run.device)}; {', '.join(f'{k} {v}' for k, v in machine.versions(run.device).items())}; commit {machine.commit()}"
    lines = [
        "# GPU run"
        if not run.dry
        else "# Dry run on the CPU: it shows that the stages work, its times mean nothing",
        "",
        setting,
        "",
    ]
    lines += ["## Parity", "", "| op | backend | passed | failed |", "|---|---|---|---|"]
    lines += [
        f"| {op} | {backend} | {v['passed']} | {v['failed']} |"
        for (op, backend), v in sorted(run.parity().items())
    ]
    lines += ["", "## Tuned tables", ""]
    for path in sorted((run.out / "tuned").glob("*.json")):
        table = tune.read_table(path)
        lines += [
            f"- {path.name}: {', '.join(f'{kernel} ({len(entries)})' for kernel, entries in sorted(table.items()))}"
        ]
    for title, file in (
        ("Ops", _OPS),
        ("Training step", _STEP),
        ("The paper's configurations", _PAPER),
        ("Ops by size", _SCALING),
    ):
        measured = results.read(run.out / file)
        lines += ["", f"## {title}", ""]
        if measured:
            lines += [results.markdown(measured)]
    lines += ["", "## What did not run or failed", ""]
    lines += _grouped(run.failures()) or ["Nothing."]
    return "\n".join(lines) + "\n"


def _grouped(failures: list[dict[str, str]]) -> list[str]:
    """One line for one reason: "op case: contender" fails the same way at many cases."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in failures:
        where, _, who = each["part"].rpartition(": ")
        groups.setdefault((each["stage"], who, each["error"]), []).append(where)
    lines = []
    for (stage, who, error), places in groups.items():
        at = (
            f" at {len(places)} cases, {places[0]} first"
            if len(places) > 1
            else f" at {places[0]}"
            if places[0]
            else ""
        )
        lines.append(f"- {stage}: {who}{at}: {error}")
    return lines


_RUN: dict[str, Callable[[Run], None]] = {
    "parity": parity_stage, "tune": tune_stage, "ops": ops_stage, "step": step_stage, "paper": paper_stage, "scaling": scaling_stage,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="everything that waits for a GPU, in stages")
    parser.add_argument(
        "--out",
        required=True,
        help="folder of the results; made where missing, kept and continued where not",
    )
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds a stage may take")
    parser.add_argument("--preset", default="mbs", help="of the training step")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, smallest cases, one round: exercises the logic",
    )
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --dry-run exercises the logic on the CPU")
    if (
        given.dry_run and os.environ.get("TRITON_INTERPRET") != "1"
    ):  # read when triton is imported, and torch has done that by now
        return subprocess.call(
            [sys.executable, "-m", "bench.gpu", *sys.argv[1:]],
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
    run = Run(
        Path(given.out),
        torch.device("cpu" if given.dry_run else "cuda"),
        given.dry_run,
        given.budget,
        given.preset,
    )
    run.out.mkdir(parents=True, exist_ok=True)
    for stage in (each for each in STAGES if each in given.stage):
        run.began = time.monotonic()
        run.forget_failures(stage)
        print(f"== {stage}, at most {run.budget:.0f} s", flush=True)
        try:
            table = run.tuned() if stage not in ("parity", "tune") else {}
            with tune.applied(table) if table else contextlib.nullcontext():
                _RUN[stage](run)
        except Exception as error:
            run.fail(stage, "the whole stage", first_line(error))
        print(f"== {stage} took {time.monotonic() - run.began:.0f} s", flush=True)
        (run.out / "summary.md").write_text(summarise(run))
    red = any(verdict["failed"] for verdict in run.parity().values()) or any(
        each["stage"] == "parity" for each in run.failures()
    )
    return int(red)


if __name__ == "__main__":
    raise SystemExit(main())
