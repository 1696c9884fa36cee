"""What all measurements of one process share: device, clock, rounds, ceilings, and which backends parity lets be timed."""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vatt_fast.kernels import dispatch
from vatt_fast.kernels.cases import Case

from . import machine, parity, results
from .floors import Mode
from .machine import DTYPES, Ceilings
from .timer import Clock, EventClock, GraphClock, HostClock

AUTO = "auto"  # whatever dispatch chooses


@dataclass
class Setting:
    """What all measurements of one process share."""

    device: torch.device
    clock: str = ""  # "" : graph replay on a GPU, perf_counter elsewhere
    rounds: int = 0  # 0: 50 on a GPU, 11 elsewhere
    warmup: int = 3
    backends: tuple[str, ...] | None = None  # None: all of the op
    peer_names: tuple[str, ...] | None = None  # None: all of the op
    compiled_peers: bool = True
    quick_ceilings: bool = False
    deadline: float | None = None  # of time.monotonic
    seconds: float | None = None  # instead: of the rounds of each race; two at least are run
    tiles: str = ""  # which tuned table is in use, where it is not the installed one
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(
        default_factory=dict
    )  # (op, backend) -> why parity forbids timing
    green: set[tuple[str, str]] = field(
        default_factory=set
    )  # (op, backend) whose parity tests passed
    report: Callable[[str], None] = print

    def __post_init__(self):
        cuda = self.device.type == "cuda"
        self.clock = self.clock or ("cuda_graph" if cuda else "perf_counter")
        self.rounds = self.rounds or (50 if cuda else 11)
        if self.clock != "perf_counter" and not cuda:
            raise ValueError(
                f"clock {self.clock!r} needs a CUDA device; on {self.device.type} it is perf_counter"
            )
        self.versions = machine.versions(self.device) | (
            {"tiles": self.tiles} if self.tiles else {}
        )
        self.device_name = machine.name(self.device)
        machine.commit()  # of the code as it was loaded: asked for and kept before anything takes hours

    def limits(self) -> dict[str, Any]:
        """How long a race that begins now may go on."""
        if self.seconds is None:
            return {"deadline": self.deadline}
        return {"deadline": time.monotonic() + self.seconds, "least": 2}

    def set_verdict(self, op: str, backend: str, reason: str | None) -> None:
        """What parity said of a backend: None where it is green."""
        self.refused.pop((op, backend), None)
        self.green.discard((op, backend))
        if reason:
            self.refused[op, backend] = reason
        else:
            self.green.add((op, backend))

    def refusal(self, ops: Iterable[str] = dispatch.OPS) -> str | None:
        """Why nothing may be timed that runs whatever dispatch chooses, a whole step or "auto": all that is chosen among must be green, but
        for what cannot run here and was skipped."""
        chosen = {op: chosen_among(op, self.device) for op in ops}
        if red := [
            f"{op} {name}"
            for op, names in chosen.items()
            for name in names
            if "red" in self.refused.get((op, name), "")
        ]:
            return f"parity is red: {', '.join(red)}"
        if dark := [
            op
            for op, names in chosen.items()
            if not any((op, name) in self.green for name in names)
        ]:
            return f"no parity test of {', '.join(dark)} has passed here"
        return None

    def make_clock(self, name: str = "") -> Clock:
        name = name or self.clock
        if name == "perf_counter":
            return HostClock(self.device)
        return GraphClock(self.device) if name == "cuda_graph" else EventClock(self.device)

    def ceilings_of(self, dtype: str) -> Ceilings:
        """The highest of this process so far: measured again for every race, since clock rates and neighbours change."""
        now = machine.measure_ceilings(self.device, DTYPES[dtype], quick=self.quick_ceilings)
        if dtype not in self.ceilings:
            self.report(
                f"ceilings on {self.device_name}: {now.tflops:.4g} TFLOP/s in {dtype}, copy {now.gb_per_s:.4g} GB/s"
            )
        best = self.ceilings.get(dtype, now)
        self.ceilings[dtype] = Ceilings(
            max(best.tflops, now.tflops), max(best.gb_per_s, now.gb_per_s)
        )
        return self.ceilings[dtype]


DTYPE_HELP = "bf16 where the device multiplies it in hardware unless given, else fp32"


def sweep_options(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """The options that drop_rate and scaling have in common; ``sweep_setting`` reads them."""
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help=DTYPE_HELP)
    parser.add_argument(
        "--mode",
        nargs="+",
        default=["fwd", "fwd+bwd"],
        choices=["fwd", "fwd+bwd"],
        help="of steps: inference, training",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help="of a race's timed rounds; at least two are run",
    )
    parser.add_argument("--minutes", type=float, help="begin nothing after this long")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the results hold for this code"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="append result lines to this file; bench/results/<device>.jsonl unless given",
    )


def sweep_setting(given: argparse.Namespace, **options: Any) -> tuple[Setting, str, Path]:
    """The setting, the dtype and the file of results."""
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    setting = Setting(
        torch.device(given.device), seconds=given.seconds, deadline=deadline, **options
    )
    return (
        setting,
        given.dtype or native_dtype(setting.device),
        given.out or results.of_device(setting.device_name),
    )


def native_dtype(device: torch.device) -> str:
    return "bf16" if dispatch.native_bf16(device) else "fp32"


def chosen_among(op: str, device: torch.device) -> list[str]:
    """Backends that dispatch may choose on a device; others are there for who asks."""
    return list(
        dict.fromkeys(
            row.backend for row in dispatch.PREFERENCE["torch", device.type] if row.op == op
        )
    )


def gate(setting: Setting, ops: Iterable[str], dtype: str, *, chosen_only: bool = False) -> None:
    """Run the parity tests of the backends that will be timed, and note which are refused.

    Args:
        chosen_only: only those that dispatch may choose, as a whole step runs them.
    """
    cpu = (
        setting.device.type == "cpu"
    )  # where a Triton kernel is only interpreted: not timed, so not tested either
    backends = {
        op: chosen_among(op, setting.device)
        if chosen_only or AUTO in (setting.backends or ())
        else setting.backends or dispatch.BACKENDS[op]
        for op in ops
    }
    pairs = [
        (op, name)
        for op, names in backends.items()
        for name in names
        if not (cpu and name.startswith("triton"))
    ]
    timeout = None if setting.deadline is None else max(1.0, setting.deadline - time.monotonic())
    found, output = parity.check(pairs, dtype, setting.device.type, timeout)
    for op, backend in pairs:
        reason = parity.objection(found, op, backend)
        setting.set_verdict(op, backend, reason)
        if reason and ("red" in reason or not found):
            setting.report(f"{op} {backend}: {reason}\n{output[-2000:]}")


def is_measured(
    setting: Setting, out: str | Path, op: str, case: Case, dtype: str, modes: Sequence[Mode]
) -> bool:
    """Whether ``out`` holds lines of ours for this code in all modes: of what dispatch chooses, unless others alone are asked for."""
    lines = results.measured(
        out, op=op, case=case.name, dtype=dtype, device=setting.device_name, ours=True
    )
    wanted = None if setting.backends and AUTO not in setting.backends else AUTO
    return set(modes) <= {line.mode for line in lines if wanted in (None, line.backend)}
