"""Tile choices of the GPU kernels: pure functions over tables tuned offline.

The tuner writes one JSON file an architecture, ``tiles/<arch>.json``: {kernel: {key: tiles}}.
Where a table, a kernel or a key is missing, the kernel's own heuristic decides. Nothing tunes at
run time, so ranks cannot differ.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

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


def key(dtype: torch.dtype, **shape: int) -> str:
    """ "bf16 queries=785 keys=785": how a table names a shape."""
    return " ".join([_SHORT[dtype], *(f"{name}={size}" for name, size in shape.items())])


@functools.cache
def table(arch: str) -> dict[str, dict[str, Tiles]]:
    """The tuned table of an architecture ("sm_90"); empty where none was tuned."""
    path = Path(__file__).parent / "tiles" / f"{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
