"""Frozen features of labelled media, computed once and kept on disk.

Shapes: N examples, W windows, D features.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.clips import ClipSpec
from ..data.labels import LabelledSource
from ..data.loader import evaluation_clips
from ..data.media import MediaError
from ..encoding import embed_batch
from ..files import InUseError, only_writer, replacing
from ..model import VATT
from .embed import model_digest
from .parts import begin, part_path, read_part, spans, write_part, written

# of a batch: values (N, W, D), names, and what was skipped
Part = tuple[dict[str, np.ndarray], list[str], dict[str, str]]
_VERSION = 1  # of what is computed: raise it where features of the same model would differ


class Features(NamedTuple):
    """Of the examples that could be read: names (N,), values (N, W, D) float32, and the others.

    Rows of windows without the modality are nan. ``cached``: read, not computed.
    """

    names: list[str]
    values: np.ndarray
    skipped: dict[str, str]
    cached: bool


def window_features(
    model: VATT,
    source: LabelledSource,
    *,
    windows: int,
    batch_size: int = 16,
    workers: int = 0,
    cache: str | os.PathLike | None = None,
) -> Features:
    """The tower's pooled output for windows spread evenly over each example; 1 is its middle.

    Features are of the source's modality, before the common space, of the centre of the picture.

    Args:
        cache: a folder. A file of it holds the features of one model, of these media (names, sizes,
            times of change, segments) and these windows; it is written whole or not at all. Each
            batch is written beside it, and the same call after a kill goes on behind the last one.

    Raises:
        ValueError: a damaged file in the cache. MediaError: no example can be read.
    """
    spec = ClipSpec.from_config(model.config)
    batches = -(-len(source) // batch_size)

    def compute(first: int, stop: int) -> Iterator[Part]:
        found = evaluation_clips(
            source,
            spec,
            vocabulary=None,
            batch_size=batch_size,
            windows=windows,
            first=first,
            stop=None if (first, stop) == (0, batches) else stop,
            with_empty=True,
            workers=workers,
        )
        for batch in found:
            values = {}
            if len(batch):
                pooled = embed_batch(model, batch, modalities=(source.modality,), pooled=True)
                rows = pooled[f"{source.modality}_pooled"]
                values["values"] = rows.reshape(-1, windows, rows.shape[1])
            skipped = {one.file: one.reason for one in batch.skipped}
            yield values, list(batch.files[::windows]), skipped

    if cache is None:
        return _joined(source, compute(0, batches))
    path = Path(cache) / f"{source.modality}_{windows}_{_key(model, source, spec, windows)}.npz"
    if path.exists():
        return _read(path)
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(parts))
        except InUseError:  # another probe is at the same features; each computes them
            return _joined(source, compute(0, batches))
        work = parts / "batches"
        begin(work, json.dumps({"batch_size": batch_size}))
        missing = [n for n in range(batches) if not part_path(work, n).exists()]
        for first, stop in spans(missing):
            for number, one in enumerate(compute(first, stop), first):
                write_part(work, number, *one)
        features = _joined(source, map(read_part, written(work)))
        said = json.dumps({"names": features.names, "skipped": features.skipped})
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, allow_pickle=False, values=features.values, said=np.array(said))
        shutil.rmtree(parts)
    return features


def _joined(source: LabelledSource, parts: Iterable[Part]) -> Features:
    names: list[str] = []
    values: list[np.ndarray] = []
    skipped: dict[str, str] = {}
    for found, files, left_out in parts:
        names += files
        values += found.values()
        skipped |= left_out
    if not names:
        raise MediaError(f"none of the {len(source)} files in {source.label} can be decoded")
    return Features(names, np.concatenate(values), skipped, False)


def _key(model: VATT, source: LabelledSource, spec: ClipSpec, windows: int) -> str:
    times = []
    for number in range(len(source)):
        place = source.place(number)
        try:
            times.append(os.stat(place.path).st_mtime_ns)
        except OSError:
            times.append(0)  # it will be skipped and listed
    parts = {
        "version": _VERSION,
        "model": model_digest(model),
        "data": source.identity,
        "times": times,
        "modality": source.modality,
        "spec": dataclasses.asdict(spec),
        "windows": windows,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _read(path: Path) -> Features:
    try:
        with np.load(path) as file:
            said = json.loads(str(file["said"]))
            return Features(said["names"], file["values"], said["skipped"], True)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error
