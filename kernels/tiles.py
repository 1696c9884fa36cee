"""Tile choices of the GPU kernels: pure functions over tables tuned offline.

The tuner writes one JSON file an architecture, ``tiles/<arch>.json``: {kernel: {key: tiles}}.
Where a table, a kernel or a key is missing, the kernel's own heuristic decides. Nothing tunes at
run time, so ranks cannot differ.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .settings import forced_tiles

Tiles = dict[str, int]  # block sizes by the names the kernel gives them, num_warps, num_stages


def choose(kernel: str, arch: str, dtype: torch.dtype, heuristic: Tiles, **shape: int) -> Tiles:
    """Tiles of ``kernel`` for a shape: those forced, else those tuned, else ``heuristic``.

    A tuned entry counts only for exactly this shape, dtype and architecture.
    """
    return forced_tiles(kernel) or table(arch).get(kernel, {}).get(key(dtype, **shape)) or heuristic


caches: list[Callable[[], None]] = []  # what empties a memory of choices, one each


def forget() -> None:
    """Have every choice made anew, after a table or ``choose`` itself was replaced."""
    for clear in caches:
        clear()


def memoised(plan: Callable[..., Tiles]) -> Callable[..., Tiles]:
    """``plan(kernel, *what it depends on)``, asked once for each of its arguments.

    To look a shape up takes as long as half of a launch. Forced tiles still come first.
    """
    remembered = functools.lru_cache(maxsize=1024)(plan)
    caches.append(remembered.cache_clear)

    @functools.wraps(plan)
    def choose(kernel: str, *rest: Any) -> Tiles:
        return forced_tiles(kernel) or remembered(kernel, *rest)

    return choose


def family(arch: str) -> str:
    """The architecture that kernels were compiled for and that is next to ``arch``.

    What fits its registers and shared memory fits those of ``arch``: B300 (sm_103) and Thor
    (sm_110) take the tiles of sm_100, GB10 (sm_121) those of sm_120, an A10 (sm_86) those of sm_89,
    and AMD's GPUs, of which gfx942 has the least shared memory, all the same.
    """
    if arch.startswith("gfx"):
        return "gfx942"
    number = int("".join(filter(str.isdigit, arch)))
    known = (80, 89, 90, 100, 120)
    if number in (86, 88):
        return "sm_89"
    return f"sm_{max((each for each in known if each <= number), default=80)}"


def key(dtype: torch.dtype, **shape: int) -> str:
    """ "bf16 queries=785 keys=785": how a table names a shape."""
    return " ".join([_SHORT[dtype], *(f"{name}={size}" for name, size in shape.items())])


@functools.cache
def table(arch: str) -> dict[str, dict[str, Tiles]]:
    """The tuned table of an architecture ("sm_90"); empty where none was tuned."""
    path = Path(__file__).parent / "tiles" / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
