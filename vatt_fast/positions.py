"""Where a token stands: resampled position tables and T5's relative buckets.

Both are constants, or arithmetic on constants, that torch and JAX share.
"""

import functools
from typing import Any

import numpy as np


@functools.lru_cache(maxsize=64)
def resample_matrix(n_old: int, n_new: int) -> np.ndarray:
    """(n_new, n_old) fp64 matrix that resamples a position table to another length.

    Natural cubic spline through points i / n_old, evaluated at j / n_new, continued as a straight
    line past the last knot with the spline's slope there (the released ``interpolate`` of position
    embeddings). It is linear in the table, so one matrix serves forward and backward.
    """
    return evaluate_spline(*spline(n_old), np.arange(n_new), n_new, xp=np)


@functools.lru_cache(maxsize=64)
def spline(n_old: int) -> tuple[np.ndarray, np.ndarray]:
    """Natural cubic splines through ``n_old`` knots, one column for each knot's unit vector.

    Returns:
        values and second derivatives at the knots, both (n_old, n_old) fp64.
    """
    knots = np.eye(n_old)
    second = np.zeros((n_old, n_old))  # zero at both ends
    if n_old > 2:
        system = 4 * np.eye(n_old - 2) + np.eye(n_old - 2, k=1) + np.eye(n_old - 2, k=-1)
        second[1:-1] = np.linalg.solve(system, 6 * (knots[:-2] - 2 * knots[1:-1] + knots[2:]))
    return knots, second


def evaluate_spline(knots: Any, second: Any, index: Any, n_new: int, *, xp: Any) -> Any:
    """``resample_matrix`` from what ``spline`` gives and ``index`` = 0 .. n_new - 1.

    In torch ``n_new`` may be symbolic: nothing here depends on its value. ``xp`` is numpy or torch.
    """
    n_old = knots.shape[0]
    if n_old == 1:
        return knots[index * 0]
    at = index * n_old  # in units of 1 / n_new of a knot's distance: exact
    left = (at // n_new).clip(max=n_old - 2)
    t = (at - left * n_new)[:, None] * (knots[:1, :1] / n_new)
    inside = (1 - t) * knots[left] + t * knots[left + 1]
    inside = inside + ((1 - t) ** 3 - (1 - t)) / 6 * second[left]
    inside = inside + (t**3 - t) / 6 * second[left + 1]
    last_slope = knots[-1] - knots[-2] + second[-2] / 6
    return xp.where(t <= 1, inside, knots[-1] + (t - 1) * last_slope)


@functools.lru_cache(maxsize=8)
def relative_position_buckets(
    length: int, num_buckets: int = 32, max_distance: int = 64
) -> np.ndarray:
    """(length, length) int64 bucket of query position minus key position.

    Bidirectional buckets of T5 (Raffel et al. 2020, section 2.1).
    """
    index = np.arange(length)
    distance = (index[:, None] - index).clip(-max_distance, max_distance)
    return distance_buckets(num_buckets, max_distance)[distance + max_distance]


@functools.lru_cache(maxsize=8)
def distance_buckets(num_buckets: int = 32, max_distance: int = 64) -> np.ndarray:
    """(2 * max_distance + 1,) int64 bucket of the distances -max_distance .. max_distance.

    Larger distances share the bucket of the largest. Half of the buckets serve keys after the
    query. In each half the first half holds exact distances, the rest grows logarithmically.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.arange(-max_distance, max_distance + 1)
    size = np.abs(distance)
    growth = np.log(np.maximum(size, exact) / exact) / np.log(max_distance / exact)
    logarithmic = np.minimum(exact + (growth * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance < 0, half, 0) + np.where(size < exact, size, logarithmic)
