"""Clips to patch rows and back, for torch tensors, NumPy and JAX arrays alike."""

import math

import numpy as np
import torch
import torch.nn.functional as F

# B batch, N patches, k values a patch


def patchify(clip, patch: tuple[int, ...], *, pad_value: float = 0):
    """Cut clips into patch rows.

    Args:
        clip: (B, T, H, W, C) with ``patch`` (frames, rows, columns), or (B, S) with ``patch``
            (samples,). Any dtype.
        pad_value: fills the far end of an axis that is no multiple of the patch: raw black,
            silence.

    Returns:
        (B, N, k): patches row-major over (time, height, width), values (t, h, w, c) inside a row.

    Raises:
        ValueError: clip and patch do not match, or the clip is empty.
    """
    axes = len(patch)
    if clip.ndim != {3: 5, 1: 2}.get(axes) or min(patch) < 1:
        raise ValueError(
            "patchify takes a clip (B, T, H, W, C) with a patch of 3 sizes, or (B, S) with one, "
            f"got {tuple(clip.shape)} and {tuple(patch)}"
        )
    if 0 in clip.shape[1:]:
        raise ValueError(
            f"the clip is {tuple(clip.shape)}; an empty one has no patches: leave it out"
        )
    short = [-size % p for size, p in zip(clip.shape[1:], patch, strict=False)]
    if any(short):
        clip = _pad(clip, short, pad_value)
    grid = [size // p for size, p in zip(clip.shape[1:], patch, strict=False)]
    pairs = (n for pair in zip(grid, patch, strict=True) for n in pair)
    split = clip.reshape(clip.shape[0], *pairs, *clip.shape[1 + axes :])
    grid_axes, patch_axes = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    order = (0, *grid_axes, *patch_axes, *range(2 * axes + 1, split.ndim))
    values = math.prod(patch) * math.prod(clip.shape[1 + axes :])
    return _permute(split, order).reshape(clip.shape[0], math.prod(grid), values)


def unpatchify(patches, patch: tuple[int, ...], shape: tuple[int, ...]):
    """Inverse of ``patchify``: rows (B, N, k) to clips (B, *shape), without the padding.

    Args:
        shape: (T, H, W, C) or (S,).

    Raises:
        ValueError: the rows are not those of such clips.
    """
    axes = len(patch)
    if len(shape) != {3: 4, 1: 1}.get(axes) or min(patch) < 1:
        raise ValueError(
            "unpatchify takes a patch of 3 sizes or 1 with shape (T, H, W, C) or (S,), "
            f"got {tuple(patch)} and {tuple(shape)}"
        )
    grid = [-(-size // p) for size, p in zip(shape, patch, strict=False)]
    channels = tuple(shape[axes:])
    expected = math.prod(grid), math.prod(patch) * math.prod(channels)
    if patches.ndim != 3 or tuple(patches.shape[1:]) != expected:
        raise ValueError(
            f"patches {tuple(patches.shape)} are not those of clips {tuple(shape)} "
            f"cut by {tuple(patch)}"
        )
    split = patches.reshape(patches.shape[0], *grid, *patch, *channels)
    pairs = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    merged = _permute(split, (0, *pairs, *range(2 * axes + 1, split.ndim)))
    sizes = (n * p for n, p in zip(grid, patch, strict=True))
    whole = merged.reshape(patches.shape[0], *sizes, *channels)
    return whole[(slice(None), *(slice(size) for size in shape))]


def _permute(x, order):
    return x.permute(order) if isinstance(x, torch.Tensor) else x.transpose(order)


def _pad(x, short: list[int], value: float):
    after = [0, *short] + [0] * (x.ndim - 1 - len(short))
    if isinstance(x, torch.Tensor):
        return F.pad(x, [n for amount in reversed(after) for n in (0, amount)], value=value)
    widths = [(0, amount) for amount in after]
    if isinstance(x, np.ndarray):
        return np.pad(x, widths, constant_values=value)
    import jax.numpy as jnp

    return jnp.pad(x, widths, constant_values=value)
