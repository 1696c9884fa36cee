"""``python -m bench <what>``: the one command of the benchmarks.

    python -m bench                     # all of this CPU, cheapest first; hours on 2 cores
    python -m bench ops                 # ops against their peers
    python -m bench steps               # whole training steps and inference, by drop rate
    python -m bench scaling             # ops by size
    python -m bench accuracy            # the demo's world pre-trained at four drop rates
    python -m bench accuracy --tables   # the paper's tables in miniature; 2 hours on 2 cores
    python -m bench data                # clips decoded a second and a core, by codec and size
    python -m bench ranks               # steps of 1, 2 and 4 gloo ranks: time, bytes sent
    python -m bench integrations        # our ops inside other libraries: errors, time, memory
    python -m bench peer-losses --packages DIR    # others' losses on several processes
    python -m bench large-index         # a run on a million files: its start, its memory
    python -m bench floors              # FLOPs, bytes and predicted times of every case
    python -m bench compile --target sm_90        # kernels through the real compilers, no device
    python -m bench tune                # the Triton kernels' tiles, on a GPU
    python -m bench gpu --out DIR       # what a quarter of an hour on a GPU is for
    python -m bench report              # figures, and the tables of the docs, from the lines

Lines go to bench/results/<machine>.jsonl. A command that measures may be killed at any time and,
with --resume, continues with what the results do not hold for this code.
"""

# argparse: a GPU machine has torch, but not necessarily the extras of vatt-fast's command line
import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vatt_fast.kernels import backends
from vatt_fast.kernels.ops import OPS

from . import (
    calls,
    cold,
    compile,
    data,
    floors,
    gpu,
    integrations,
    large_index,
    lines,
    miniature,
    peer_losses,
    ranks,
    report,
    steps,
    sweeps,
    tune,
)
from .machine import DTYPES, GPUS, ROOT, TPUS
from .peers import peers
from .setting import AUTO, Setting, chosen_among, gate, is_measured, native_dtype
from .sweeps import Cell
from .timer import keep_host_memory

# what `python -m bench` alone runs, cheapest first
_STAGES = (
    "ops --device cpu --seconds 30 --resume",
    "steps --device cpu --configuration tiny --resume",
    "scaling --device cpu --resume",
    "steps --device cpu --resume",
)
_COMPILED_AT = [0.5]  # drop rates with compiled steps on a CPU


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="what")
    ops, both = list(OPS), ["fwd", "fwd+bwd"]

    def add(run: Any, help: str) -> Any:
        made = commands.add_parser(
            run.__name__.strip("_").replace("_", "-"), help=help, description=help
        )
        made.set_defaults(run=run, parser=made)
        return made.add_argument

    def add_measured(run: Any, help: str, seconds: float | None, modes: Sequence[str]) -> Any:
        option = add(run, help)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        option("--device", default=here, choices=["cpu", "cuda"])
        option("--dtype", choices=[*DTYPES], help="bf16 where the hardware multiplies it, or fp32")
        option("--mode", nargs="+", default=both, choices=modes)
        option("--seconds", type=float, default=seconds, help="of a race; two rounds at least run")
        option("--resume", action="store_true", help="leave out what the results hold")
        option("--out", help="append lines to this file; the machine's own unless given, '': none")
        return option

    option = add_measured(_ops, "time ops against peers", None, floors.MODES)
    option("--op", nargs="+", choices=ops, default=ops)
    option("--case", nargs="+", help="names, primary, parity or cpu; by default what fits")
    option("--backends", nargs="+", help="ours, auto among them; all of the op unless given")
    option("--peers", nargs="*", help="all of the op unless given; give none for ours alone")

    option = add_measured(_steps, "time whole steps, by drop rate", 60, both)
    told = dict(choices=steps.CONFIGURATIONS, metavar="NAME", help=", ".join(steps.CONFIGURATIONS))
    option("--configuration", nargs="+", default=list(steps.OF_THE_PAPER), **told)
    option("--drop-rate", type=float, nargs="+", default=list(sweeps.DROP_RATES))
    option("--batch", type=int, help="clips; 1 on a CPU and 16 on a GPU, of tiny 32, unless given")
    option("--compile", nargs="*", default=["default"], help="its modes; on a CPU at rate 0.5")

    option = add_measured(_scaling, "time ops by size", 30, both)
    option("--op", nargs="+", choices=sweeps.SIZES, default=list(sweeps.SIZES))

    option = add(_accuracy, "pre-train the demo's world by drop rate; 90 minutes on 2 cores")
    option("--drop-rate", type=float, nargs="+", default=list(sweeps.DROP_RATES))
    option("--seed", type=int, nargs="+", default=list(sweeps.SEEDS))
    option("--tables", action="store_true", help="the paper's tables in miniature instead")
    every = miniature.cells(0)
    for name in ("model", "task", "method"):  # of the tables; all unless given
        known = list(dict.fromkeys(getattr(cell, name) for cell in every))
        help_text = f"of the tables, these alone: {', '.join(known)}"
        option(f"--{name}", nargs="+", choices=known, metavar="NAME", help=help_text)
    option("--steps", type=int, help="1000, of the tables 600, unless given")
    option("--clips", type=int, nargs=2, default=[1200, 200], help="trained on and held out")
    option("--folder", type=Path, default=Path("runs/accuracy"), help="of runs; several GB")
    option("--out", type=Path, help="append to this file; one in bench/results unless given")

    option = add(_data, "decode clips, beside bare PyAV and others; a minute a case")
    option(
        "--case", nargs="+", default=list(data.CASES), metavar="NAME", help=", ".join(data.CASES)
    )
    option("--rounds", type=int, default=12)
    option("--out", type=Path, default=data.FILE, help="append the rows")
    told_of_cold = "instead, time tars that are not in memory, read by so many workers"
    option("--cold", type=int, metavar="WORKERS", help=told_of_cold)
    option("--folder", type=Path, help="of --cold, on the disk to be measured")

    option = add(_ranks, "steps of 1, 2 and 4 gloo ranks: time, bytes sent")
    option("--configuration", default="tiny", **told)
    option("--batch", type=int, default=32, help="clips of a step, on all ranks")
    option("--rounds", type=int, default=30, help="steps that are timed")
    option("--resume", action="store_true", help="leave out what the results hold")
    option("--out", type=Path, default=ranks.FILE, help="append the rows")

    option = add(_integrations, "our ops inside other libraries, against their own paths")
    option("--speed", type=int, default=0, metavar="ROUNDS", help="a column of time")
    option(
        "--memory",
        type=int,
        metavar="BATCH",
        help="columns of peak memory, of the losses at this batch",
    )
    option("--ours", action="store_true", help="with --memory: leave theirs out")
    option("--packages", type=Path, help="a folder of packages, tried first")

    option = add(_peer_losses, "other packages' losses on several processes, against one")
    option("--packages", required=True, help="folder that they are installed in")

    option = add(_large_index, "start on an index of HowTo100M's size: time and memory")
    option("--examples", type=int, default=1_000_000)
    option("--captions", type=int, default=110, help="of an example")
    option("--shards", type=int, default=1000, help="0: single files")
    option("--folder", type=Path, help="for a folder that is removed again")

    option = add(_floors, "print what every case costs at least")
    option("--op", nargs="+", choices=ops, default=ops)
    option("--dtype", choices=[*DTYPES], default="bf16")

    option = add(_tune, "tune the Triton kernels' tiles on this GPU")
    option("--op", nargs="+", choices=ops, default=ops)
    option("--case", nargs="+", default=["primary"])
    option("--dtype", default="bf16", choices=[*DTYPES])
    option("--out", type=Path, help="keys in it stay; kernels/tiles/<arch>.json unless given")

    option = add(_compile, "compile kernels for devices that are not here")
    option("--target", nargs="+", choices=[*GPUS, *TPUS], default=list(GPUS))
    option("--op", nargs="+", choices=ops, default=ops)
    option("--dtype", nargs="+", choices=[*DTYPES, "tf32"])
    option("--case", nargs="+", help="names, primary, model, GPU: variants; primary and these")
    option("--alone", action="store_true", help="TPU: attention without its projections")
    option("--resume", action="store_true", help="leave out what the file holds")
    option("--schedule", action="store_true", help="TPU: bundles, cycles and spills by kernel")
    named = ["flash", "splash", "xla", "triton"]
    option("--peers", nargs="+", default=[], choices=named, help="too; GPU: triton, TPU: others")
    option("--out", type=Path, help="append the rows to this file, as JSON lines")
    option("--read", nargs="+", type=Path, help="only print the table of the rows in these files")

    option = add(_gpu, "what a quarter of an hour on a GPU is for")
    option("--out", type=Path, required=True, help="folder; continued where it exists")
    option("--item", nargs="+", default=list(gpu.ITEMS), choices=gpu.ITEMS)
    option("--minutes", type=float, default=gpu.MINUTES, help="of all items")
    option("--dry-run", action="store_true", help="on the CPU, smallest cases, one round")

    option = add(_report, "figures, and the marked tables of the docs")
    option("--results", type=Path, default=lines.RESULTS, help="folder of result lines")
    option("--out", type=Path, default=ROOT / "bench" / "figures", help="folder of the figures")
    marked = ("benchmarks", "data", "devices", "evaluation")
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in marked)]
    option("--pages", type=Path, nargs="*", default=pages, help="their marked tables are made anew")
    option("--check", action="store_true", help="write nothing; 1 where a table would change")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        return _everything()
    try:
        return given.run(given)
    except ValueError as error:
        return given.parser.error(str(error))  # exits with status 2


def _everything() -> int:
    status = 0
    for stage in _STAGES:
        print(f"== python -m bench {stage}", flush=True)
        command = [sys.executable, "-m", "bench", *stage.split()]
        status |= subprocess.call(command, cwd=ROOT)
    return int(status != 0)


# -- measuring --------------------------------------------------------------------------------


def _setting(given: argparse.Namespace, **options: Any) -> tuple[Setting, str]:
    """The setting that options ask for, and the dtype."""
    device = torch.device(given.device)
    made = Setting(device, seconds=given.seconds, **options)
    return made, given.dtype or native_dtype(device)


def _out(given: argparse.Namespace, setting: Setting) -> Path | None:
    """The file that takes the lines: the machine's own unless another is asked for, or none."""
    if given.out is None:
        return setting.file
    return Path(given.out) if given.out else None


def _ops(given: argparse.Namespace) -> int:
    """First the parity check of each backend; then each contender's error at the case itself."""
    keep_host_memory()
    cpu = given.device == "cpu"
    if given.out is None and (given.backends or given.peers is not None):
        given.out = ""  # some contenders alone are kept in no file
    status = 0
    for op in given.op:
        known = (AUTO, *backends.BACKENDS[op])
        if unknown := sorted(set(given.backends or ()) - {*known}):
            raise ValueError(f"unknown backends {', '.join(unknown)}; {op} has {', '.join(known)}")
        # what a user gets, and those it is chosen among; the others would be refused one by one
        chosen = [AUTO, *chosen_among(op, torch.device("cpu"))] if cpu else None
        asked = given.backends or chosen
        names = None if given.peers is None else tuple(given.peers)
        peers(op, names)  # refuses unknown names before anything is measured
        setting, dtype = _setting(given, backends=asked and tuple(asked), peer_names=names)
        cases = calls.select(op, given.case or ["cpu" if cpu else "primary"])
        out = _out(given, setting)
        if given.resume:
            cases = [c for c in cases if not is_measured(setting, out, op, c, dtype, given.mode)]
        if cases:
            gate(setting, [op], dtype)
        wanted = [(op, case) for case in cases]
        _tell(sweeps.measure_cases(setting, wanted, dtype, given.mode, out)[1])
        status |= setting.red
    return int(status)


def _tell(missing: Sequence[sweeps.Missing]) -> None:
    for each in missing:
        print(f"absent: {': '.join(each)}", flush=True)


def _steps(given: argparse.Namespace) -> int:
    setting, dtype = _setting(given, clock="perf_counter", rounds=7, warmup=0)
    on_gpu = given.device == "cuda"
    wanted = []
    for name, mode, rate in itertools.product(given.configuration, given.mode, given.drop_rate):
        usual = 32 if name == "tiny" else 16 if on_gpu else 1
        modes = tuple(given.compile) if on_gpu or rate in _COMPILED_AT else ()
        wanted.append(Cell(name, rate, mode, given.batch or usual, modes))
    out = _out(given, setting)
    if given.resume and out:
        wanted = sweeps.unmeasured(wanted, dtype, out, setting)
    if not wanted:
        return 0
    gate(setting, OPS, dtype, chosen_only=True)
    if reason := setting.refusal():
        raise SystemExit(f"nothing is timed: {reason}")
    missing = sweeps.measure_cells(setting, wanted, dtype, out)
    _tell(missing)
    return int(any(who == "all" or who.startswith("auto") for _, who, _ in missing))


def _scaling(given: argparse.Namespace) -> int:
    keep_host_memory()
    setting, dtype = _setting(given, warmup=1)
    out = _out(given, setting)
    status = 0
    for op in given.op:
        cases = sweeps.SIZES[op].values()
        if given.resume and all(is_measured(setting, out, op, c, dtype, given.mode) for c in cases):
            continue
        gate(setting, [op], dtype, chosen_only=True)
        status |= setting.refusal([op]) is not None
        _tell(sweeps.measure_sizes(setting, op, dtype, given.mode, out, resume=given.resume))
    return int(status)


def _accuracy(given: argparse.Namespace) -> int:
    clips = tuple(given.clips)
    if given.tables:
        out = given.out or miniature.TABLES
        scores = miniature.measure(
            given.seed, given.steps or 600, clips, given.folder, out,
            wanted=lambda cell: all(
                asked is None or own in asked
                for asked, own in ((given.model, cell.model), (given.task, cell.task),
                                   (given.method, cell.method))
            ),
        )  # fmt: skip
        print(miniature.tables(scores))
        return 0
    out = given.out or sweeps.ACCURACY
    runs = sweeps.measure_accuracy(
        given.drop_rate, given.seed, given.steps or 1000, clips, given.folder, out
    )
    print(sweeps.accuracy_table(runs))
    return 0


def _data(given: argparse.Namespace) -> int:
    if unknown := [name for name in given.case if name not in data.CASES]:
        raise ValueError(f"no case {unknown[0]!r}; there are {', '.join(data.CASES)}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.cold is not None:
            return cold.run(given.case, given.rounds, given.cold, Path(folder))
        return data.run(given.case, given.rounds, Path(folder), given.out)


def _ranks(given: argparse.Namespace) -> int:
    return ranks.run(given.configuration, given.batch, given.rounds, given.out, given.resume)


def _integrations(given: argparse.Namespace) -> int:
    return integrations.run(given.memory, given.speed, given.ours, given.packages)


def _peer_losses(given: argparse.Namespace) -> int:
    return peer_losses.run(given.packages)


def _large_index(given: argparse.Namespace) -> int:
    return large_index.run(given.examples, given.captions, given.shards, given.folder)


# -- without a measurement of speed, or on a GPU ----------------------------------------------


def _floors(given: argparse.Namespace) -> int:
    print(floors.sheet(given.op, given.dtype))
    return 0


def _tune(given: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a CUDA device, and this torch sees none")
    setting = Setting(torch.device("cuda"), rounds=20)
    gate(setting, given.op, given.dtype)
    wanted = [(op, case) for op in given.op for case in calls.select(op, given.case)]
    path = given.out or tune.installed_path()
    with tune.compiled_first(tune.workers()) as refusals:
        what = (setting, wanted, given.dtype, path, tune.read_table(path))
        missing = tune.tune_cases(*what, refusals=refusals)
    for part, reason in missing:
        print(f"not tuned: {part}: {reason}")
    return int(any(tune.tunable(part.partition(" ")[0]) for part, _ in missing))


def _compile(given: argparse.Namespace) -> int:
    if given.read:
        print(compile.read(given.read))
        return 0
    on_gpu = [each for each in given.target if each in GPUS]
    on_tpu = [each for each in given.target if each in TPUS]
    if on_gpu and on_tpu and given.out:
        raise ValueError("rows of GPUs and of TPUs differ; give --out to each by itself")
    if on_gpu and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is set: kernels are then interpreted; unset it")
    what = (given.op, given.case, given.dtype, given.out)
    options = dict(schedule=given.schedule, alone=given.alone, peers=given.peers)
    options["resume"] = given.resume
    made = [compile.compile_targets(each, *what, **options) for each in (on_gpu, on_tpu) if each]
    return max(made)


def _gpu(given: argparse.Namespace) -> int:
    if not given.dry_run and not torch.cuda.is_available():
        raise ValueError("this torch sees no CUDA device; --dry-run exercises the logic on the CPU")
    if given.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        # read when Triton is imported, and torch has done that by now
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench", *sys.argv[1:]]
        return subprocess.call(command, env=environment)
    device = torch.device("cpu" if given.dry_run else "cuda")
    return gpu.main(gpu.Run(given.out, device, given.dry_run), given.item, given.minutes)


def _report(given: argparse.Namespace) -> int:
    return report.build(given.results, given.out, given.pages, check=given.check)


if __name__ == "__main__":
    raise SystemExit(main())
