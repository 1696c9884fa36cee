"""Which tokens of a step stay, drawn on the host (VATT, section 3.3)."""

import hashlib
import math

import numpy as np
from torch import Tensor

# N tokens, K kept


def num_kept(num_tokens: int, drop_rate: float) -> int:
    """K = N - ceil(drop_rate * N), with room for the rounding of rates such as 0.9.

    Raises:
        ValueError: no token, drop_rate outside [0, 1), or so high that it keeps none.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; there must be at least one")
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; it is the fraction removed and lies in [0, 1)")
    kept = num_tokens - math.ceil(drop_rate * num_tokens - 1e-9)
    if kept < 1:
        raise ValueError(
            f"drop_rate {drop_rate} keeps none of {num_tokens} tokens;"
            f" take at most {1 - 1 / num_tokens:.6g}"
        )
    return kept


def sample_keep(
    num_tokens: int,
    drop_rate: float,
    *,
    seed: int,
    step: int,
    stream: str,
    per: str = "batch",
    batch: int | None = None,
) -> np.ndarray:
    """Draw the kept indices of one step, on the host.

    A pure function of its arguments, the same on every platform.
    Every token gets a 64-bit hash of (seed, step, stream, clip, index); the K smallest stay.

    Args:
        num_tokens: N. drop_rate: fraction removed, in [0, 1).
        seed, step: of the run. stream: names what must differ within a step, such as "video/3" for
            rank 3.
        per: "batch" draws once for all clips, "clip" once for each of ``batch`` clips.

    Returns:
        int32 indices, distinct and sorted: (K,), or (batch, K) per clip.
        K = N - ceil(drop_rate * N).

    Raises:
        ValueError: drop_rate outside [0, 1) or keeping nothing, no token, unknown ``per``, or per
            clip without a batch.
    """
    if per not in ("batch", "clip"):
        raise ValueError(f"per is {per!r}; it is 'batch' or 'clip'")
    if (per == "clip" and batch is None) or (batch is not None and batch < 1):
        raise ValueError(
            f"per='clip' draws for each of `batch` clips, and batch is {batch}; give at least 1"
        )
    draws = batch if per == "clip" and batch else 1
    kept = num_kept(num_tokens, drop_rate)
    key = int.from_bytes(
        hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest(), "little"
    )
    clips = np.arange(draws, dtype=np.uint64)
    index = np.arange(num_tokens, dtype=np.uint64)
    scores = _mix(
        _mix(np.uint64(key) ^ _mix(clips))[:, None] ^ index
    )  # one hash a token; ties fall to the lower index
    keep = np.sort(np.argsort(scores, axis=1, kind="stable")[:, :kept], axis=1).astype(np.int32)
    return keep if per == "clip" else keep[0]


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014).

    A bijection of 64 bits without visible structure.
    """
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def check_keep(keep: Tensor | np.ndarray, num_tokens: int, *, name: str = "keep") -> None:
    """Host check of indices that were not drawn by ``sample_keep``.

    They are integers, at least one, in range, sorted and without repeats, else ValueError.
    Reads the values: call it where indices enter, not in a step's hot path on a device.
    """
    values = np.asarray(keep.cpu() if isinstance(keep, Tensor) else keep)
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(
            f"{name} is {values.shape} {values.dtype};"
            " it takes at least one integer index, (K,) or (B, K)"
        )
    if values.min() < 0 or values.max() >= num_tokens:
        raise ValueError(
            f"{name} spans {values.min()} .. {values.max()}; indices lie in 0 .. {num_tokens - 1}"
        )
    if (np.diff(values.astype(np.int64), axis=-1) <= 0).any():  # unsigned differences would wrap
        raise ValueError(
            f"{name} repeats an index or is not sorted; indices must increase:"
            " sort them and drop repeats"
        )
