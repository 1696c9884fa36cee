"""``python -m bench.scaling``: time and memory of an op against its size, ours against the peers of bench.run.

attention against tokens, the contrastive loss against clips, patch_embed (half of the patches kept) against the pixels of a clip. A contender
that, by its growth so far, would take too long or more memory than is free leaves the race at that size, and says so. With --resume what the
results hold for this code is not measured again. ``python -m bench.report`` draws the figures, each with its floor.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vatt_fast.kernels.cases import AttentionCase, Case, NCECase, PatchEmbedCase

from . import results
from .floors import Mode
from .peers import peers
from .results import Line
from .run import describe, measure
from .setting import AUTO, Setting, gate, is_measured, sweep_options, sweep_setting
from .timer import first_line, keep_host_memory, trim_host_memory

_PATCH = (4, 16, 16)


def _attention(tokens: int) -> Case:
    return AttentionCase(f"scaling_tokens_{tokens}", 1, tokens, tokens, 12, 64, packed=True)


def _nce(clips: int) -> Case:
    return NCECase(f"scaling_clips_{clips}", clips, clips, 1, 512, bound=True)


def _patch_embed(frames: int, side: int) -> Case:
    patches = math.prod(
        size // patch for size, patch in zip((frames, side, side), _PATCH, strict=True)
    )
    clip = (frames, side, side, 3)
    name = f"scaling_pixels_{frames * side * side}"
    return PatchEmbedCase(
        name, 1, patches, 3 * math.prod(_PATCH), 1024, kept=patches // 2, clip=clip, patch=_PATCH
    )


# op -> {size: case}, AGG among the tokens
CASES: dict[str, dict[int, Case]] = {
    "attention": {tokens: _attention(tokens) for tokens in (197, 393, 785, 1569, 3201, 6401)},
    "contrastive_lse": {1 << power: _nce(1 << power) for power in range(10, 17)},
    "patch_embed": {
        frames * side * side: _patch_embed(frames, side)
        for frames, side in ((16, 112), (32, 112), (32, 160), (32, 224), (64, 224), (64, 320))
    },
}


_COMPILED_UP_TO = {
    "contrastive_lse": 1 << 15
}  # torch.compile unrolls the peers' loop over chunks: with 64 of them a quarter of an hour was not enough


class _Cost(NamedTuple):
    size: int
    ms: float
    peak_bytes: int


def predict(known: Sequence[_Cost], size: int) -> _Cost:
    """What a call of another size would cost, by the growth between the two largest known; squared where there is one alone."""
    *_, before, last = (known[0], *known) if len(known) == 1 else known

    def grown(value: str) -> float:
        small, large = max(1, getattr(before, value)), max(1, getattr(last, value))
        power = (
            2.0 if before is last else math.log(large / small) / math.log(last.size / before.size)
        )
        return large * (size / last.size) ** min(2.0, max(1.0, power))

    return _Cost(size, grown("ms"), int(grown("peak_bytes")))


def objection(expected: _Cost, longest_ms: float, free_bytes: int) -> str | None:
    """Why a call is not tried."""
    if expected.ms > longest_ms:
        return (
            f"a call would take about {expected.ms / 1e3:.0f} s, more than {longest_ms / 1e3:.0f}"
        )
    if expected.peak_bytes > free_bytes:
        return f"a call would take about {expected.peak_bytes / 2**30:.0f} GiB, {free_bytes / 2**30:.0f} are free"
    return None


def free_bytes(device: torch.device) -> int:
    """Four fifths of what the device, or the machine, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 4 // 5
    trim_host_memory()  # what this process keeps is free
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 * 4 // 5


def measure_op(
    setting: Setting,
    op: str,
    sizes: Sequence[int],
    dtype: str,
    modes: Sequence[Mode],
    out: Path,
    *,
    longest: float,
    resume: bool,
) -> list[tuple[str, str, str]]:
    """Append the lines of an op, smallest size first, until the setting's deadline; (case, contender, reason) of who is absent.

    Args:
        longest: seconds of a call: who would take longer leaves the race.
    """
    costs: dict[tuple[str, str], list[_Cost]] = {}
    absent: list[tuple[str, str, str]] = []
    for size in sorted(sizes):
        case = CASES[op][size]
        if resume and is_measured(setting, out, op, case, dtype, modes):
            known = results.measured(
                out, op=op, case=case.name, dtype=dtype, device=setting.device_name
            )
            lines = list(
                {(line.backend, line.mode): line for line in known if line.mode in modes}.values()
            )  # the last of each
        else:
            if setting.deadline is not None and time.monotonic() > setting.deadline:
                return [*absent, (f"{op} {case.name}", "all", "out of time; --resume continues")]
            left_out = _too_slow_or_large(
                costs, size, modes, 1e3 * longest, setting.device
            ) | _too_long_to_compile(op, size)
            try:
                lines, others = _race(setting, op, case, dtype, modes, left_out)
            except Exception as error:  # out of memory with all contenders' state at once, say
                lines, others = [], {"all": first_line(error)}
            absent += [
                (f"{op} {case.name}", name, reason) for name, reason in (left_out | others).items()
            ]
            for line in lines:
                print(describe(line), flush=True)
            results.append(out, lines)
        for line in lines:
            costs.setdefault((line.backend, line.mode), []).append(
                _Cost(size, line.ms_p50, line.peak_bytes or 0)
            )
    return absent


def _too_slow_or_large(
    costs, size: int, modes: Sequence[Mode], longest_ms: float, device: torch.device
) -> dict[str, str]:
    found: dict[str, str] = {}
    for (name, mode), known in costs.items():
        if mode in modes and (
            reason := objection(predict(known, size), longest_ms, free_bytes(device))
        ):
            found[name] = reason
    return found


def _too_long_to_compile(op: str, size: int) -> dict[str, str]:
    if size <= _COMPILED_UP_TO.get(op, size):
        return {}
    return {
        peer.name: f"torch.compile is not waited for beyond {_COMPILED_UP_TO[op]}"
        for peer in peers(op)
        if peer.compiled
    }


def _race(
    setting: Setting, op: str, case: Case, dtype: str, modes: Sequence[Mode], left_out
) -> tuple[list[Line], dict[str, str]]:
    ours = () if AUTO in left_out else (AUTO,)
    theirs = tuple(peer.name for peer in peers(op) if peer.name not in left_out)
    here = dataclasses.replace(setting, backends=ours, peer_names=theirs)
    return measure(here, op, case, dtype, modes) if ours else ([], {})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="time and memory against size; about half an hour on 2 cores"
    )
    sweep_options(parser, seconds=30)
    parser.add_argument("--op", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--size", type=int, nargs="+", help="tokens, clips or pixels; all of the op unless given"
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=30,
        help="seconds of a call: who would take longer leaves the race",
    )
    given = parser.parse_args(arguments)
    setting, dtype, out = sweep_setting(given, warmup=1)
    status = 0
    for op in given.op:
        sizes = given.size or list(CASES[op])
        if unknown := sorted(set(sizes) - set(CASES[op])):
            parser.error(
                f"{op} has no size {', '.join(map(str, unknown))}; it has {', '.join(map(str, CASES[op]))}"
            )
        if given.resume and all(
            is_measured(setting, out, op, CASES[op][size], dtype, given.mode) for size in sizes
        ):
            continue
        gate(setting, [op], dtype, chosen_only=True)
        status |= int(setting.refusal([op]) is not None)
        for absent in measure_op(
            setting, op, sizes, dtype, given.mode, out, longest=given.longest, resume=given.resume
        ):
            print(f"absent: {': '.join(absent)}", flush=True)
    return status


if __name__ == "__main__":
    keep_host_memory()
    raise SystemExit(main())
