"""Compile kernels for devices that are not here, and read what the real compilers made of them.

    python -m bench compile --target sm_90 --op attention       # Triton
    python -m bench compile --target v5e --op attention --case video_mbs_drop50 --schedule
    python -m bench compile --read bench/results/compile_tpu.jsonl   # the table of old rows

*Compiled for*, never run: this says nothing of speed. ``compile_gpu.py`` and ``compile_tpu.py`` say
what is compiled, what a row tells and what counts as a fault. All GPU targets take about half an
hour on two cores, all TPUs hours.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vatt_fast.kernels.cases import CASES, tag

GPUS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def cases_of(ops: Iterable[str], names: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """(op, case) by name, or every primary one."""
    for op in ops:
        for case in CASES[op].values():
            if case.name in names if names else tag(case) == "primary":
                yield op, case.name


def compile_gpu_targets(
    targets: Sequence[str],
    ops: Sequence[str],
    cases: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    out: Path | None,
) -> int:
    """Print the table of Triton's kernels and write their rows; 1 where one has a fault.

    Args:
        dtypes: None: bf16 and fp32, of attention bf16 alone, whose fp32 takes hours.
    """
    from . import compile_gpu as gpu  # needs Triton

    rows: list[gpu.Row] = []
    for op, case in cases_of(ops, cases):
        for dtype in dtypes or (("bf16",) if op == "attention" else ("bf16", "fp32")):
            for target in targets:
                rows += gpu.compile_case(op, case, dtype, target)
        _progress(f"{op} {case}: {len(gpu.distinct(rows))} distinct kernels so far")
    rows = gpu.distinct(rows)
    if out:
        _write(out, rows, "w")
    return _conclude(rows, gpu.markdown(rows), "kernels", targets)


def compile_tpu_targets(
    targets: Sequence[str],
    ops: Sequence[str],
    cases: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    out: Path | None,
    *,
    alone: bool,
    schedule: bool,
) -> int:
    """Print the table of the Pallas kernels and append their rows; 1 where one has a fault.

    Args:
        alone: attention without its projections.
        schedule: count bundles and spills of every kernel; takes three times as long.
    """
    if schedule:  # read when libtpu is loaded
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={tempfile.mkdtemp()} --xla_jf_dump_llo_text=true"
        )
    from . import compile_tpu as tpu  # needs JAX and libtpu

    rows: list[tpu.Row] = []
    for op, case in cases_of(ops, cases):
        for dtype in dtypes or ("bf16", "fp32"):
            for target in targets:
                row = tpu.compile_case(op, case, dtype, target, alone=alone and op == "attention")
                rows.append(row)
                if out:
                    _write(out, [row], "a")
                told = "".join(
                    f"  {name} {count} bundles, {row.spills.get(name, 0)} spills"
                    for name, count in row.bundles.items()
                )
                outcome = "; ".join(row.faults) or f"{row.seconds} s"
                _progress(f"{op} {case} {dtype} {target}: {outcome}{told}")
    return _conclude(rows, tpu.markdown(rows), "programs", targets)


def read(path: Path) -> str:
    """The table of the rows in a file."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    if rows and "topology" in rows[0]:
        from . import compile_tpu as tpu

        return tpu.markdown([tpu.Row(**row) for row in rows])
    from . import compile_gpu as gpu

    return gpu.markdown([gpu.Row(**row) for row in rows])


def heaviest(
    rows: Iterable[Any], key: Callable[[Any], tuple], cells: Callable[[list[Any]], Sequence[Any]]
) -> list[str]:
    """Rows of a table, one a group: its key, then what ``cells`` makes of the group."""
    groups: dict[tuple, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [
        "| " + " | ".join(map(str, (*name, *cells(group)))) + " |" for name, group in groups.items()
    ]


def headings(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _write(path: Path, rows: Iterable[Any], how: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(how) as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _conclude(rows: Sequence[Any], table: str, what: str, targets: Sequence[str]) -> int:
    if not rows:
        raise ValueError("no such case; see kernels/cases.py")
    print(table)
    bad = [row for row in rows if row.faults]
    for row in bad:
        print(f"{row.title}: {'; '.join(row.faults)}")
    print(f"{len(rows)} {what} compiled for {', '.join(targets)}; {len(bad)} with faults")
    return int(bool(bad))
