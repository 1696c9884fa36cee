"""Recall at 1, 5 and 10, the median rank (paper section 4.4), and the best hits of a query."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# similarities held at once, 64 MB in fp32; the whole (Q, N) of 100k clips would take 40 GB
_CHUNK_ELEMENTS = 2**24


def retrieval_metrics(
    queries: np.ndarray, targets: np.ndarray, truth: np.ndarray | Sequence[Sequence[int]]
) -> dict[str, float]:
    """How far up each query finds its right target, by dot product (cosine for unit vectors).

    A rank counts every target that is at least as similar as the right one. Ties go against the
    model, so that constant embeddings score 0 and not 100. Of several right targets the most
    similar one counts, and the others never stand in its way.

    Args:
        queries: (Q, D) float.
        targets: (N, D) float.
        truth: (Q,) integer index of each query's target, or for each query those of its targets.

    Returns:
        r1, r5, r10 in percent of queries, median_rank (1 is best).

    Raises:
        ValueError: empty, of different widths, not finite, or truth out of range.
    """
    return metrics_of_ranks(retrieval_ranks(queries, targets, truth))


def retrieval_ranks(
    queries: np.ndarray, targets: np.ndarray, truth: np.ndarray | Sequence[Sequence[int]]
) -> np.ndarray:
    """(Q,) ranks from 1 on; the arguments and errors of ``retrieval_metrics``."""
    queries, targets = _matrix("queries", queries), _matrix("targets", targets)
    _same_width(queries, targets)
    right = _right_targets(truth, len(queries), len(targets))
    return np.concatenate(
        [_ranks(similarity, right[rows]) for rows, similarity in _chunks(queries, targets)]
    )


def metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, and the median of ranks (Q,)."""
    recall = {f"r{k}": 100 * np.count_nonzero(ranks <= k) / len(ranks) for k in (1, 5, 10)}
    return recall | {"median_rank": float(np.median(ranks))}


def _right_targets(truth: Any, queries: int, targets: int) -> np.ndarray:
    """(Q, M) indices of right targets, filled up with -1."""
    if isinstance(truth, np.ndarray) or all(np.ndim(one) == 0 for one in truth):
        truth = np.asarray(truth)
        if truth.shape != (queries,) or truth.dtype.kind not in "iu":
            raise ValueError(
                f"truth is {truth.shape} {truth.dtype}; "
                f"it must hold one integer for each of {queries} queries"
            )
        right = truth[:, None]
    else:
        each = [sorted({int(one) for one in some}) for some in truth]
        if len(each) != queries or not all(each):
            raise ValueError(
                f"truth holds {len(each)} lists, {each.count([])} of them empty; "
                f"each of {queries} queries has at least one right target"
            )
        right = np.full((queries, max(map(len, each))), -1)
        for row, some in zip(right, each, strict=True):
            row[: len(some)] = some
    named = right[:, 0]  # the least of each
    if named.min() < 0 or right.max() >= targets:
        raise ValueError(
            f"truth spans {named.min()} .. {right.max()}; there are targets 0 .. {targets - 1}"
        )
    return right


def _chunks(queries: np.ndarray, targets: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """A few queries at a time: which, and their similarity to every target."""
    size = max(1, _CHUNK_ELEMENTS // len(targets))
    for first in range(0, len(queries), size):
        rows = slice(first, first + size)
        yield rows, queries[rows] @ targets.T


def _ranks(similarity: np.ndarray, right: np.ndarray) -> np.ndarray:
    own = np.take_along_axis(similarity, right, axis=1)
    own[right < 0] = -np.inf
    best = own.max(1, keepdims=True)
    return (similarity >= best).sum(1) - (own >= best).sum(1) + 1


def mean_of_units(embeddings: np.ndarray, windows: int) -> np.ndarray:
    """The mean of each clip's windows brought to unit norm, itself not of unit norm.

    Its dot product with a unit vector is the mean of the windows' cosines, which the released
    evaluation gives as its second measure.

    Args:
        embeddings: (clips * windows, D), clip-major.

    Returns:
        (clips, D).
    """
    embeddings = _matrix("embeddings", embeddings)
    return _windows_of(_unit(embeddings), windows).mean(1)


def mean_of_windows(embeddings: np.ndarray, windows: int) -> np.ndarray:
    """The normalised mean of each clip's windows, as the released evaluation takes it.

    Args:
        embeddings: (clips * windows, D), clip-major.

    Returns:
        (clips, D).
    """
    return _unit(_windows_of(_matrix("embeddings", embeddings), windows).mean(1))


def _windows_of(embeddings: np.ndarray, windows: int) -> np.ndarray:
    if windows < 1 or len(embeddings) % windows:
        raise ValueError(
            f"{len(embeddings)} embeddings are not {windows} windows of every clip; "
            "they must divide evenly"
        )
    return embeddings.reshape(-1, windows, embeddings.shape[1])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(x.dtype).tiny)


def top_k(queries: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) indices of the most similar targets, best first; ties fall to the lower index."""
    queries, targets = _matrix("queries", queries), _matrix("targets", targets)
    _same_width(queries, targets)
    if not 1 <= k <= len(targets):
        raise ValueError(f"k is {k}; it lies in 1 .. {len(targets)}, the number of targets")
    best = np.empty((len(queries), k), np.int64)
    for rows, similarity in _chunks(queries, targets):
        # the k-th best: only what reaches it is sorted
        least = -np.partition(-similarity, k - 1, axis=1)[:, k - 1]
        for row, (values, threshold) in enumerate(
            zip(similarity, least, strict=True), start=rows.start
        ):
            candidates = np.flatnonzero(values >= threshold)
            best[row] = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
    return best


def factor_agreement(
    top: np.ndarray,
    query_factors: Mapping[str, Sequence[Any]],
    target_factors: Mapping[str, Sequence[Any]],
) -> dict[str, float]:
    """Percent of queries whose best hit shares each factor.

    It tells a model that matches colours alone from one that understands all factors.

    Args:
        top: (Q,) index of each query's best target.
        query_factors, target_factors: {factor: a value for each query, or target}.

    Raises:
        ValueError: no queries, other factors on the two sides, a missing value, or ``top`` out of
            range.
    """
    top = np.asarray(top)
    if top.ndim != 1 or not len(top) or top.dtype.kind not in "iu":
        raise ValueError(
            f"top is {top.shape} {top.dtype}; "
            "it must hold one target index a query, as top_k(...)[:, 0] does"
        )
    if set(query_factors) != set(target_factors):
        raise ValueError(
            f"queries have factors {sorted(query_factors)}, targets {sorted(target_factors)}; "
            "they must be the same"
        )
    agreement = {}
    for name, wanted in query_factors.items():
        if len(wanted) != len(top):
            raise ValueError(
                f"factor {name!r} has {len(wanted)} values for {len(top)} queries; "
                "it takes one each"
            )
        if top.min() < 0 or top.max() >= len(target_factors[name]):
            last = len(target_factors[name]) - 1
            raise ValueError(
                f"top spans {top.min()} .. {top.max()}; "
                f"factor {name!r} is given for targets 0 .. {last}"
            )
        hits = [target_factors[name][hit] for hit in top]
        shared = sum(hit == value for hit, value in zip(hits, wanted, strict=True))
        agreement[name] = 100 * shared / len(wanted)
    return agreement


def _matrix(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind != "f":
        raise ValueError(
            f"{name} is {x.shape} {x.dtype}; "
            "it must be a float matrix (rows, D) with at least one row"
        )
    if not np.isfinite(x).all():
        raise ValueError(
            f"{name} holds {(~np.isfinite(x)).any(1).sum()} rows that are not finite; "
            "leave clips without this modality out"
        )
    # products in half precision would tie far too often
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _same_width(queries: np.ndarray, targets: np.ndarray) -> None:
    if queries.shape[1] != targets.shape[1]:
        raise ValueError(
            f"queries are {queries.shape[1]} wide, targets {targets.shape[1]}; "
            "compare embeddings of one common space"
        )
