"""Where a token stands: resampled position tables and T5's relative buckets, as NumPy constants shared by every framework."""

import functools

import numpy as np


@functools.lru_cache(maxsize=64)
def resample_matrix(n_old: int, n_new: int) -> np.ndarray:
    """(n_new, n_old) fp64 matrix that resamples a position table to another length.

    Natural cubic spline through points i / n_old, evaluated at j / n_new, continued as a straight line past the last
    knot with the spline's slope there (the released ``interpolate`` of position embeddings). Linear in the table, so
    one matrix serves torch and JAX, forward and backward.
    """
    if n_old == n_new:
        return np.eye(n_old)
    if n_old == 1:
        return np.ones((n_new, 1))
    knots = np.eye(n_old)
    # second derivatives of the spline at the knots, one column per knot's unit vector; zero at both ends
    second = np.zeros((n_old, n_old))
    if n_old > 2:
        system = 4 * np.eye(n_old - 2) + np.eye(n_old - 2, k=1) + np.eye(n_old - 2, k=-1)
        second[1:-1] = np.linalg.solve(system, 6 * (knots[:-2] - 2 * knots[1:-1] + knots[2:]))
    at = np.arange(n_new) * (n_old / n_new)
    left = np.minimum(at.astype(int), n_old - 2)
    t = (at - left)[:, None]
    inside = (1 - t) * knots[left] + t * knots[left + 1]
    inside += ((1 - t) ** 3 - (1 - t)) / 6 * second[left] + (t**3 - t) / 6 * second[left + 1]
    last_slope = knots[-1] - knots[-2] + second[-2] / 6
    return np.where(t <= 1, inside, knots[-1] + (t - 1) * last_slope)


@functools.lru_cache(maxsize=8)
def relative_position_buckets(
    length: int, num_buckets: int = 32, max_distance: int = 64
) -> np.ndarray:
    """(length, length) int64 bucket of query position minus key position, bidirectional (T5; Raffel et al. 2020, section 2.1).

    Half of the buckets serve keys after the query. In each half the first half holds exact distances, the rest grows
    logarithmically up to ``max_distance``.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    size = np.abs(distance)
    growth = np.log(np.maximum(size, exact) / exact) / np.log(max_distance / exact)
    logarithmic = np.minimum(exact + (growth * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance < 0, half, 0) + np.where(size < exact, size, logarithmic)
