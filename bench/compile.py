"""Compile kernels for devices that are not here, and read what the real compilers made of them.

    python -m bench compile --target sm_90 --op attention --peers triton
    python -m bench compile --target v5e --op attention --case video_mbs_drop50 --schedule
    python -m bench compile --read bench/results/compile_tpu.jsonl   # the table of old rows

*Compiled for*, never run: this says nothing of speed. ``compile_gpu.py`` and ``compile_tpu.py`` say
what is compiled, what a row tells and what counts as a fault. All GPU targets take about half an
hour on two cores, all TPUs hours.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vatt_fast.kernels.cases import CASES, Case, DropTokenCase, tag

from .lines import markdown_table
from .machine import TPUS
from .timer import first_line


def compile_targets(
    targets: Sequence[str],
    ops: Sequence[str],
    cases: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    out: Path | None,
    *,
    schedule: bool = False,
    alone: bool = False,
    resume: bool = False,
    peers: Sequence[str] = (),
) -> int:
    """Print a table of what GPUs or TPUs got and append its rows; 1 where one has a fault.

    Args:
        cases: None: every primary one and, for GPUs, their variants.
        dtypes: None: bf16 and fp32; for GPUs attention in bf16 alone, whose fp32 takes hours. GPUs
            know tf32 too: fp32 whose products are rounded.
        alone: of TPUs: attention without its projections.
        schedule: of TPUs: count bundles, spills and cycles of every kernel; takes three times as
            long.
        resume: leave out what ``out`` holds; of GPUs after compiling it.
        peers: others' kernels after ours, in rows of their own. For TPUs flash, splash and xla,
            of attention; for GPUs triton, the plain kernels.
    """
    tpu = targets[0] in TPUS
    if peers and tpu and (set(ops) != {"attention"} or "triton" in peers):
        raise ValueError("TPUs' peers are flash, splash and xla, of attention: --op attention")
    if tpu and "tf32" in (dtypes or ()):
        raise ValueError("tf32 is of GPUs: TPUs know bf16 and fp32")
    if peers and not tpu and set(peers) != {"triton"}:
        raise ValueError("GPUs' peers are plain Triton kernels: --peers triton")
    if schedule:  # read when libtpu is loaded
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={tempfile.mkdtemp()} --xla_jf_dump_llo_text=true"
        )
    module = _module(tpu)
    known = _rows(out, module) if resume and out and out.exists() else []
    options: list[dict[str, Any]] = [dict(peers=bool(peers))]
    if tpu:
        options = [dict(alone=alone), *(dict(peer=peer) for peer in peers)]
    rows: list[Any] = []
    failed: list[str] = []
    for op, case, dtype in _chosen(ops, cases, dtypes, module):
        for target, option in itertools.product(targets, options):
            what = (op, case, dtype, target)
            if tpu and any(module.is_of(row, *what, **option) for row in known):
                continue
            try:
                compiled = module.compile_case(*what, **option)
            except Exception as error:  # the others are worth knowing
                failed.append(f"{' '.join(what)}: {first_line(_cause(error))}")
                print(error, file=sys.stderr, flush=True)
                continue
            made = module.distinct(compiled, known + rows)
            rows += made
            told = "; ".join(fault for row in made for fault in row.faults) or "no fault"
            if schedule:
                told += f"; bundles {made[0].loops}, at least {made[0].cycles} cycles"
                told += f", spills {made[0].spills}"
            print(f"{' '.join(what)}: {len(made)} rows, {told}", file=sys.stderr, flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in made)
    print(_table(rows, module))
    bad = [row for row in rows if row.faults]
    for row in bad:
        print(f"{row.title}: {'; '.join(row.faults)}")
    for each in failed:
        print(f"did not compile: {each}")
    print(f"{len(rows)} rows compiled for {', '.join(targets)}; {len(bad)} with faults")
    return int(bool(bad or failed))


def _chosen(
    ops: Iterable[str], names: Sequence[str] | None, dtypes: Sequence[str] | None, module: Any
) -> Iterator[tuple[str, str, str]]:
    found = False
    for op in ops:
        primary = [case.name for case in CASES[op].values() if tag(case) == "primary"]
        variants = [each.case.name for each in getattr(module, "VARIANTS", {}).get(op, ())]
        model = [name for name in primary if in_a_step(CASES[op][name])]
        known = {"primary": primary, "variants": variants, "model": model}
        for name in names or ("primary", "variants"):
            for each in known.get(name, [name] if name in {*CASES[op], *variants} else []):
                found = True
                for dtype in dtypes or module.usual_dtypes(op, each):
                    if name != "model" or module.reached(op, each, dtype):
                        yield op, each, dtype
    if not found:
        raise ValueError("no such case; see kernels/cases.py")


def in_a_step(case: Case) -> bool:
    """Whether a step of mbs or of tiny meets it: half of the patches dropped, or none."""
    origin = case.origin
    if origin is None or (isinstance(case, DropTokenCase) and case.kept == case.tokens):
        return False
    return bool({"mbs", "tiny"} & {*origin.presets}) and origin.drop_rate in (0.0, 0.5)


def _cause(error: BaseException) -> BaseException:
    """The first error: Triton's own say where it was met."""
    return _cause(error.__cause__) if error.__cause__ else error


def _module(tpu: bool) -> Any:
    if tpu:
        from . import compile_tpu  # needs JAX and libtpu

        return compile_tpu
    from . import compile_gpu  # needs Triton

    return compile_gpu


def read(paths: Sequence[Path]) -> str:
    """The table of the rows in files, all of GPUs or all of TPUs."""
    module = _module('"topology"' in paths[0].read_text().partition("\n")[0])
    rows = [row for path in paths for row in _rows(path, module)]
    return _table(module.distinct(rows, []), module)


def _rows(path: Path, module: Any) -> list[Any]:
    whole = path.read_text().rpartition("\n")[0]  # without half a row of a killed run
    return [module.Row(**json.loads(text)) for text in whole.splitlines()]


def _table(rows: Iterable[Any], module: Any) -> str:
    """A row a group: its key, then what the module's ``cells`` makes of the group.

    Of GPUs an overview comes first, and last a row a main loop.
    """
    rows = list(rows)
    groups: dict[tuple, list[Any]] = {}
    for row in rows:
        groups.setdefault(module.key(row), []).append(row)
    told = [(*name, *module.cells(group)) for name, group in groups.items()]
    tables = [markdown_table(module.HEADINGS.split(", "), told)]
    if hasattr(module, "schedule"):
        tables = [module.overview(rows), *tables, f"{module.schedule(rows)}\n"]
    return "\n\n".join(tables)
