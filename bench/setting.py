"""What all measurements of one process share: device, clock, ceilings, and what parity allows."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vatt_fast.kernels import backends, dispatch, parity
from vatt_fast.kernels.cases import CASES, Case, tag
from vatt_fast.kernels.ops import OPS

from . import lines, machine
from .floors import Mode
from .machine import DTYPES, Ceilings
from .timer import Clock, EventClock, GraphClock, HostClock, first_line

AUTO = "auto"  # whatever dispatch chooses
RED = "parity is red"


@dataclass
class Setting:
    """What all measurements of one process share."""

    device: torch.device
    clock: str = ""  # "": graph replay on a GPU, perf_counter elsewhere
    rounds: int = 0  # 0: 50 on a GPU, 11 elsewhere
    warmup: int = 3
    backends: tuple[str, ...] | None = None  # None: all of the op
    peer_names: tuple[str, ...] | None = None  # None: all of the op
    quick: bool = False  # sizes of the ceilings that only exercise the code
    deadline: float | None = None  # of time.monotonic
    seconds: float | None = None  # instead: of the rounds of each race; at least two are run
    tiles: str = ""  # which tuned table is in use, where it is not the installed one
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    # (op, backend) -> why parity forbids timing, None where it is green
    verdicts: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def __post_init__(self):
        cuda = self.device.type == "cuda"
        self.clock = self.clock or ("cuda_graph" if cuda else "perf_counter")
        self.rounds = self.rounds or (50 if cuda else 11)
        if self.clock != "perf_counter" and not cuda:
            raise ValueError(f"clock {self.clock!r} needs a CUDA device; use perf_counter")
        self.versions = machine.versions(self.device)
        if self.tiles:
            self.versions["tiles"] = self.tiles
        self.device_name = machine.name(self.device)
        machine.commit()  # of the code as it was loaded, before anything takes hours

    @property
    def machine(self) -> tuple[str, str]:
        return self.device_name, self.versions.get("instructions", "")

    @property
    def file(self) -> Path:
        return lines.file_of(self.device_name, self.versions)

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def limits(self) -> dict[str, Any]:
        """How long a race that begins now may go on."""
        if self.seconds is None:
            return {"deadline": self.deadline}
        return {"deadline": time.monotonic() + self.seconds, "least": 2}

    def set_verdict(self, op: str, backend: str, reason: str | None) -> None:
        self.verdicts[op, backend] = reason

    @property
    def refused(self) -> dict[tuple[str, str], str]:
        return {pair: reason for pair, reason in self.verdicts.items() if reason}

    @property
    def green(self) -> set[tuple[str, str]]:
        return self.verdicts.keys() - self.refused.keys()

    def refusal(self, ops: Iterable[str] = tuple(OPS)) -> str | None:
        """Why what dispatch chooses among, in a whole step or as "auto", may not be timed.

        All of it must be green, except for what cannot run here.
        """
        chosen = {op: chosen_among(op, self.device) for op in ops}
        pairs = [(op, name) for op, names in chosen.items() for name in names]
        if red := [pair for pair in pairs if RED in self.refused.get(pair, "")]:
            return f"{RED}: {', '.join(' '.join(pair) for pair in red)}"
        if dark := [op for op in chosen if not any(of == op for of, _ in self.green & {*pairs})]:
            return f"no parity check of {', '.join(dark)} has passed here"
        return None

    @property
    def red(self) -> bool:
        return any(RED in why or "error beyond" in why for why in self.refused.values())

    def make_clock(self, name: str = "") -> Clock:
        name = name or self.clock
        if name == "perf_counter":
            return HostClock(self.device)
        return GraphClock(self.device) if name == "cuda_graph" else EventClock(self.device)

    def ceilings_of(self, dtype: str) -> Ceilings:
        """The highest of this process so far.

        Measured again for every race, since clock rates and neighbours change.
        """
        now = machine.measure_ceilings(self.device, DTYPES[dtype], quick=self.quick)
        best = self.ceilings.get(dtype)
        if best is None:
            told = f"{now.tflops:.4g} TFLOP/s in {dtype}, copy {now.gb_per_s:.4g} GB/s"
            print(f"ceilings on {self.device_name}: {told}")
            best = now
        highest = Ceilings(max(best.tflops, now.tflops), max(best.gb_per_s, now.gb_per_s))
        self.ceilings[dtype] = highest
        return highest


def native_dtype(device: torch.device) -> str:
    """bf16 where the device multiplies it in hardware, else fp32."""
    return "bf16" if dispatch.native_bf16(device) else "fp32"


def chosen_among(op: str, device: torch.device) -> list[str]:
    """Backends that dispatch may choose on a device; others are there for who asks."""
    rows = backends.PREFERENCE["torch", device.type]
    return list(dict.fromkeys(row.backend for row in rows if row.op == op))


def interpreted(backend: str, device: torch.device) -> bool:
    """Triton's interpreter would run it here: that takes no time worth telling."""
    return device.type == "cpu" and backend.startswith("triton")


def verdict_of(
    op: str,
    backend: str,
    dtype: str,
    device: torch.device,
    deadline: float | None = None,
    cases: Iterable[Case] | None = None,
) -> str | None:
    """Run the battery's check at every parity case of the op: None is green, else the reason."""
    passed, failures, unsupported = 0, [], ""
    for case in cases or (case for case in CASES[op].values() if tag(case) == "parity"):
        if deadline is not None and time.monotonic() > deadline:
            return "its parity checks ran out of time"
        try:
            parity.check(op, backend, case, DTYPES[dtype], device.type)
            passed += 1
        except ValueError as error:
            if "cannot run this" not in str(error):
                raise
            unsupported = str(error)
        except Exception as error:  # a wrong value, or whatever a broken kernel raises
            failures.append(f"{case.name}: {first_line(error)}")
    if failures:
        return f"{RED}: {len(failures)} failed, {passed} passed; {failures[0]}"
    return None if passed else f"no parity case ran: {unsupported}"


def gate(setting: Setting, ops: Iterable[str], dtype: str, *, chosen_only: bool = False) -> None:
    """Check the backends that will be timed, and note which are refused.

    Args:
        chosen_only: only those that dispatch may choose, as a whole step runs them.
    """
    for op in ops:
        names = [] if chosen_only else list(setting.backends or backends.BACKENDS[op])
        if chosen_only or AUTO in names:
            names += chosen_among(op, setting.device)
        for name in dict.fromkeys(names):
            if name == AUTO or interpreted(name, setting.device):
                continue
            reason = verdict_of(op, name, dtype, setting.device, setting.deadline)
            setting.set_verdict(op, name, reason)
            if reason and RED in reason:
                print(f"{op} {name}: {reason}")


def is_measured(
    setting: Setting, out: Path | None, op: str, case: Case, dtype: str, modes: Sequence[Mode]
) -> bool:
    """Whether ``out`` holds fresh lines of "auto" in all modes, or of ours where not asked for."""
    if out is None:
        return False
    found = lines.measured(out, setting.machine, op=op, case=case.name, dtype=dtype, ours=True)
    wanted = None if setting.backends and AUTO not in setting.backends else AUTO
    return set(modes) <= {line.mode for line in found if wanted in (None, line.backend)}
