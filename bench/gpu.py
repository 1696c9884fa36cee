"""What a quarter of an hour on a GPU is for, most valuable first, into one folder.

    python -m bench gpu --out DIR --minutes 12      # called again, it continues where it stopped
    python -m bench gpu --out DIR --item tune       # some of it
    python -m bench gpu --out DIR --dry-run         # on the CPU, smallest cases, one round

compile    the kernels timed below, on all cores: the rest waits for no compiler  -> compile.jsonl
parity     bf16: primary cases with few clips, then the battery's own       -> parity.jsonl
attention  at 785, 1569 and 393 tokens: tiles, one pass or two, SDPA's kernels    -> ops.jsonl
ops        patch_embed, contrastive_lse, drop_token against their peers     -> ops.jsonl
tune       tiles, of those whose code has no fault                          -> tuned/<arch>.json
step       a training step of MBS, and torch.compile's strongest            -> step.jsonl

Every part is noted as it ends (parts.jsonl, summary.md); one that fails is told there, and the rest
goes on. The exit status is 1 where parity is red. For more, with more time: ``bench ops``,
``steps``, ``scaling`` and ``tune`` on a CUDA device, and pytest.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vatt_fast.kernels import backends, parity, settings
from vatt_fast.kernels.cases import CASES, Case, make, tag
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.tiles import Tiles

from . import calls, contenders, lines, machine, sweeps, tune
from .contenders import Contender
from .floors import Mode, work
from .machine import DTYPES
from .measure import Task, race
from .report import tables
from .setting import RED, Setting, chosen_among, verdict_of
from .sweeps import Cell
from .timer import first_line, side_stream

MINUTES = 12.0
BACKEND = tune.BACKEND
# the strongest peers: each compiled one costs the time of a compilation
_PEERS: dict[str, tuple[str, ...]] = {
    "attention": ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
    "patch_embed": ("gather_first", "gather_first_compiled"),
    "contrastive_lse": ("materialised", "materialised_compiled", "cut_cross_entropy"),
    "drop_token": ("gather",),
}
_OUT_OF_TIME = "out of time; run it again to continue"
# what is timed, and, compiled beforehand, under which tiles besides the kernels' own
_TIMED: dict[str, tuple[str, ...]] = {
    "attention": ("video_mbs_drop50", "video_mbs_drop0", "video_mbs_drop75"),
    "patch_embed": ("video_mbs_drop50", "audio_bbs_drop50", "video_mbs_drop0"),
    "contrastive_lse": ("va_bbs_one_device", "vt_bbs_one_device", "vt_bbs"),
    "drop_token": ("video_mbs_drop50",),
}
_TILES = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3))
_WAYS: dict[Mode, dict[str, dict[str, Tiles]]] = {
    "fwd": {
        f"{T}x{S} w{warps} s{stages}": {
            "attention_forward": dict(BLOCK_T=T, BLOCK_S=S, num_warps=warps, num_stages=stages)
        }
        for T, S, warps, stages in _TILES
    },
    "bwd": {
        "one pass": {"attention_backward": dict(ONE_PASS=1)},
        "two passes": {"attention_backward": dict(ONE_PASS=0)},
    },
}
# what a dry run does instead: enough to pass every line of the logic
_DRY = dict(
    attention="one_query_one_key",
    patch_embed="one_patch",
    contrastive_lse="one_pair",
    drop_token="one_of_one",
)

Missing = list[tuple[str, str]]  # what is not there, why
Part = tuple[str, Callable[[], Missing]]


@dataclasses.dataclass
class Run:
    """One invocation: where results go, and until when (time.monotonic) its present item may go."""

    out: Path
    device: torch.device
    dry: bool
    deadline: float = float("inf")

    @property
    def dtype(self) -> str:
        return "fp32" if self.dry else "bf16"

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def here(self) -> dict[str, object]:
        return {"commit": machine.commit(), "device": machine.name(self.device), "dry": self.dry}

    def file(self, name: str) -> Path:
        return self.out / f"{name}.jsonl"

    def cases(self, op: str) -> list[Case]:
        return [CASES[op][name] for name in ((_DRY[op],) if self.dry else _TIMED[op])]

    def records(self, name: str) -> list[dict[str, Any]]:
        """Of this commit and device: others prove nothing here."""
        path = self.file(name)
        found = path.read_text().splitlines() if path.exists() else []
        return [each for each in map(json.loads, found) if self.here.items() <= each.items()]

    def note(self, name: str, **what: Any) -> None:
        with self.file(name).open("a") as file:
            file.write(json.dumps(self.here | what) + "\n")

    def setting(self, **options: Any) -> Setting:
        """What parity.jsonl does not show green may not be timed."""
        if self.dry:
            options |= dict(rounds=1, warmup=1, quick=True)
        made = Setting(self.device, deadline=self.deadline, **options)
        verdicts = self.verdicts()
        for op, names in backends.BACKENDS.items():
            for name in names:
                reasons = verdicts.get((op, name), {"": "its parity check did not run here"})
                made.set_verdict(op, name, _refusal(reasons.values()))
        return made

    def verdicts(self) -> dict[tuple[str, str], dict[str, str | None]]:
        """{(op, backend): {case: why it is not green, or None}}."""
        found: dict[tuple[str, str], dict[str, str | None]] = {}
        for each in self.records("parity"):
            found.setdefault((each["op"], each["backend"]), {})[each["case"]] = each["reason"]
        return found

    def tuned(self) -> tune.Table:
        """What the item has written into the folder."""
        paths = sorted((self.out / "tuned").glob("*.json"))
        return tune.read_table(paths[0]) if paths else {}


def _refusal(reasons: Iterable[str | None]) -> str | None:
    """None where one case is green and none is red."""
    why = list(reasons)
    if red := [each for each in why if each and RED in each]:
        return red[0]
    return None if None in why else next(iter(why), None)


def _side_by_side(
    run: Run, function: Callable, jobs: list, take: Callable[[Any, Any], Missing]
) -> Missing:
    """Give ``take`` (job, result or exception) as they come; what found no time is missing too."""
    missing: Missing = []
    with tune.workers() as pool:  # ended with the block, whatever they are at
        results = pool.imap_unordered(functools.partial(_tried, function), jobs)
        for count in range(len(jobs)):
            try:
                left = max(0.0, run.deadline - time.monotonic())
                found = results.next(timeout=min(left, threading.TIMEOUT_MAX))
            except multiprocessing.TimeoutError:
                return [*missing, (f"{len(jobs) - count} left", _OUT_OF_TIME)]
            missing += take(*found)
    return missing


def _tried(function: Callable, job: Any) -> tuple[Any, Any]:
    try:
        return job, function(*job)
    except Exception as error:
        return job, RuntimeError(first_line(error))


# -- compile ----------------------------------------------------------------------------------


def _compile_parts(run: Run) -> Iterator[Part]:
    if not run.dry:  # what is interpreted cannot be compiled
        yield "timed kernels", functools.partial(_compile, run)


def _compile(run: Run) -> Missing:
    """Fill Triton's cache, and keep what the code is."""
    ways = [way for of_mode in _WAYS.values() for way in of_mode.values()]
    arch = tune.arch()
    jobs: list[tuple] = [(op, case.name, arch, {}) for op in OPS for case in run.cases(op)]
    jobs += [("attention", case.name, arch, way) for case in run.cases("attention") for way in ways]

    def take(job, rows) -> Missing:
        if isinstance(rows, Exception):
            return [(" ".join(job[:2]), str(rows))]
        for row in rows:
            run.note("compile", **dataclasses.asdict(row))
        return [(row.title, "; ".join(row.faults)) for row in rows if row.faults]

    return _side_by_side(run, _compiled_rows, jobs, take)


def _compiled_rows(op: str, case: str, arch: str, choices: dict[str, Tiles]) -> list[Any]:
    from .compile_gpu import compile_case  # needs Triton, compiling

    with settings.force_tiles(**choices):
        return compile_case(op, case, "bf16", arch)


# -- parity -----------------------------------------------------------------------------------


def _check_all(run: Run) -> Missing:
    """Every case by itself, in processes side by side, what is timed first; noted as they come."""
    few = [(op, calls.reduced(case, torch.device("cpu"))) for op in OPS for case in run.cases(op)]
    if not run.dry:
        few += [(op, case) for op in OPS for case in CASES[op].values() if tag(case) == "parity"]
    names = {op: ["reference", BACKEND] if run.dry else chosen_among(op, run.device) for op in OPS}
    jobs = [
        (op, name, case, run.dtype, run.device)
        for op, case in few
        for name in names[op]
        if case.name not in run.verdicts().get((op, name), {})
    ]

    def take(job, reason) -> Missing:
        op, name, case, *_ = job
        reason = f"{RED}: {reason}" if isinstance(reason, Exception) else reason
        run.note("parity", op=op, backend=name, case=case.name, reason=reason)
        print(f"{op} {name} {case.name}: {reason or 'green'}", flush=True)
        return [(f"{op} {name} {case.name}", reason)] if reason and RED in reason else []

    return _side_by_side(run, _check, jobs, take)


def _check(op: str, name: str, case: Case, dtype: str, device: torch.device) -> str | None:
    torch.set_num_threads(1)  # the truth is computed on the host, in many processes
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:  # an earlier check's fault is not this one's
            return f"not checked: this process has lost the device: {first_line(error)}"
    return verdict_of(op, name, dtype, device, cases=[case])


# -- ops --------------------------------------------------------------------------------------


def _race_ways(run: Run, op: str, case: Case) -> Missing:
    """Our kernels as they choose, under other tiles and plans, and SDPA's, in one race a mode."""
    own = "reference" if run.dry else BACKEND  # what is interpreted is not timed
    setting = run.setting(backends=(own,), peer_names=_PEERS[op])
    absent: dict[str, str] = {}
    rate = case.origin.drop_rate if case.origin else None
    with side_stream(run.device):
        present = contenders.of_op(setting, op, case, run.dtype, absent)
        ours = [each for each in present if each.name == own]
        for mode, ways in _WAYS.items():
            others = [_under(run, op, case, ours[0], *way) for way in ways.items() if ours]
            absent |= {each.name: why for each, why in others if why}
            right = [each for each, why in others if not why]
            least = work(case, mode, DTYPES[run.dtype].itemsize)
            task = Task(op, case.name, run.dtype, mode, least, rate)
            found, missing = race(setting, task, [*present, *right])
            sweeps.keep(found, run.file("ops"))
            absent |= {f"{name} {mode}": reason for name, reason in missing.items()}
    return list(absent.items())


def _under(
    run: Run, op: str, case: Case, ours: Contender, name: str, way: dict[str, Tiles]
) -> tuple[Contender, str | None]:
    """Ours under other tiles, by kernel; why it may not be timed."""

    def build(mode: Mode):
        built = ours.build(mode)
        return built if isinstance(built, str) else [tune.under(way, call) for call in built]

    errors: dict[str, float] = {}
    dtype = DTYPES[run.dtype]
    inputs = make(calls.reduced(case, run.device), dtype, run.device, seed=99)
    try:
        with settings.force_tiles(**way):
            found = calls.values(calls.on_backend(op, ours.name), op, inputs)
        errors = parity.errors(found, calls.truth(op, inputs, dtype))
        reason = calls.red(errors, ours.errors, dtype)
    except Exception as error:  # such as tiles that want more than the device has
        reason = first_line(error)
    other = dataclasses.replace(ours, name=f"{ours.name} {name}", build=build, errors=errors)
    return other, reason


def _race_peers(run: Run, op: str, case: Case) -> Missing:
    modes: tuple[Mode, ...] = ("fwd", "fwd+bwd")
    names = [name for name in _PEERS[op] if not (run.dry and name.endswith("_compiled"))]
    setting, out = run.setting(peer_names=tuple(names)), run.file("ops")
    _, missing = sweeps.measure_cases(setting, [(op, case)], run.dtype, modes, out)
    return [(f"{where}: {who}", why) for where, who, why in missing]


# -- tune and step ----------------------------------------------------------------------------


def _tune_case(run: Run, op: str, case: Case) -> Missing:
    path = run.out / "tuned" / f"{tune.arch()}.json"
    table = ({} if run.dry else tune.read_table(tune.installed_path())) | tune.read_table(path)
    setting = run.setting(rounds=20)
    gate = contextlib.nullcontext() if run.dry else tune.compiled_first(tune.workers())
    with gate as refusals:
        what = (setting, [(op, case)], run.dtype, path, table)
        return tune.tune_cases(*what, few=run.dry, refusals=refusals)


def _step(run: Run) -> Iterator[Part]:
    mbs = Cell("mbs", 0.5, "fwd+bwd", 16)
    cells = [mbs, mbs._replace(compile=("max-autotune-no-cudagraphs",))]
    for cell in [Cell("tiny", 0.5, "fwd+bwd", 2)] if run.dry else cells:
        yield " ".join((cell.case, *cell.compile)), functools.partial(_race_steps, run, cell)


def _race_steps(run: Run, cell: Cell) -> Missing:
    table = run.tuned()
    tiles = "tuned in this run" if table else ""
    setting = run.setting(clock="perf_counter", rounds=7, warmup=1, tiles=tiles)
    if reason := setting.refusal():
        return [("", reason)]
    with tune.applied(table) if table else contextlib.nullcontext():
        found = sweeps.measure_cells(setting, [cell], run.dtype, run.file("step"))
    return [(f"{where}: {who}", why) for where, who, why in found]


def _cases(
    do: Callable[[Run, str, Case], Missing], *ops: str, dry: tuple[str, ...] = ()
) -> Callable[[Run], Iterator[Part]]:
    """Parts: a case of an op each; the first case of every op before the second of one."""

    def parts(run: Run) -> Iterator[Part]:
        chosen = dry or ops if run.dry else ops
        for turn in itertools.zip_longest(*map(run.cases, chosen)):
            for op, case in zip(chosen, turn, strict=True):
                if case:
                    yield f"{op} {case.name}", functools.partial(do, run, op, case)

    return parts


_MEASURED = ("patch_embed", "contrastive_lse", "drop_token")
_TUNED = ("attention", "contrastive_lse", "patch_embed")
# item -> (its share of the time, its parts)
ITEMS: dict[str, tuple[float, Callable[[Run], Iterator[Part]]]] = {
    "compile": (0.08, _compile_parts),
    "parity": (0.17, lambda run: iter([(run.dtype, functools.partial(_check_all, run))])),
    "attention": (0.23, _cases(_race_ways, "attention")),
    "ops": (0.16, _cases(_race_peers, *_MEASURED)),
    # interpreted, these two take seconds
    "tune": (0.20, _cases(_tune_case, *_TUNED, dry=("drop_token", "contrastive_lse"))),
    "step": (0.16, _step),
}


def main(run: Run, items: Iterable[str], minutes: float) -> int:
    """Do the items in their order; 1 where parity is red."""
    run.out.mkdir(parents=True, exist_ok=True)
    print(machine.name(run.device), machine.versions(run.device), flush=True)
    end = time.monotonic() + 60 * minutes
    left = {item: ITEMS[item] for item in ITEMS if item in items}
    for item, (share, parts) in list(left.items()):
        # what one leaves goes to the others
        part_of_left = share / sum(each for each, _ in left.values())
        run.deadline = time.monotonic() + part_of_left * (end - time.monotonic())
        del left[item]
        for name, do in parts(run):
            done = {(each["item"], each["part"]) for each in run.records("parts") if each["done"]}
            if (item, name) not in done:
                _do(run, item, name, do)
                (run.out / "summary.md").write_text(summarise(run))
    return int(any(RED in (why or "") for each in run.verdicts().values() for why in each.values()))


def _do(run: Run, item: str, name: str, do: Callable[[], Missing]) -> None:
    began = time.monotonic()
    print(f"== {item}: {name}", flush=True)
    try:
        missing = [("", _OUT_OF_TIME)] if run.out_of_time else do()
    except Exception as error:
        missing = [("", first_line(error))]
    done = not any("out of time" in why for _, why in missing)
    seconds = round(time.monotonic() - began, 1)
    run.note("parts", item=item, part=name, done=done, seconds=seconds, missing=missing)


# -- summary ----------------------------------------------------------------------------------


def summarise(run: Run) -> str:
    """Markdown of what the folder holds."""
    title = "# GPU run"
    if run.dry:
        title = "# Dry run on the CPU: it shows that the items work, its times mean nothing"
    versions = ", ".join(f"{name} {value}" for name, value in machine.versions(run.device).items())
    here = f"{machine.name(run.device)}; {versions}; commit {machine.commit()}"
    last = {(each["item"], each["part"]): each for each in run.records("parts")}
    rows = [
        (item, part, each["seconds"], "" if each["done"] else "not finished")
        for (item, part), each in last.items()
    ]
    verdicts = [
        (op, backend, len(by_case), _refusal(by_case.values()) or "green")
        for (op, backend), by_case in sorted(run.verdicts().items())
    ]
    tuned = [f"{kernel} ({len(entries)})" for kernel, entries in sorted(run.tuned().items())]
    left = [
        f"- {': '.join(filter(None, (item, part, what, why)))}"
        for (item, part), each in last.items()
        for what, why in each["missing"]
    ]
    told = [title, here, lines.markdown_table(("item", "part", "seconds", ""), rows)]
    told += ["## Parity", lines.markdown_table(("op", "backend", "cases", "verdict"), verdicts)]
    told += ["## Tuned", ", ".join(tuned) or "Nothing."]
    for name, heading in (("ops", "Ops"), ("step", "Training step")):
        if measured := lines.read(run.file(name)):
            told += [f"## {heading}", tables.every_line(tables.current(measured))]
    told += ["## What did not run or failed", "\n".join(left) or "Nothing."]
    return "\n\n".join(told) + "\n"
