"""Frozen features of labelled media, computed once and kept on disk.

Shapes: N examples, W windows, D features.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.clips import ClipSpec
from ..data.labels import LabelledSource
from ..data.loader import evaluation_clips
from ..encoding import embed_batch
from ..files import replacing
from ..model import VATT
from .embed import model_digest

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
            times of change, segments) and these windows; it is written whole or not at all.

    Raises:
        ValueError: a damaged file in the cache. MediaError: no example can be read.
    """
    spec = ClipSpec.from_config(model.config)
    path = None
    if cache is not None:
        key = _key(model, source, spec, windows)
        path = Path(cache) / f"{source.modality}_{windows}_{key}.npz"
        if path.exists():
            return _read(path)
    names: list[str] = []
    parts: list[np.ndarray] = []
    skipped: dict[str, str] = {}
    for batch in evaluation_clips(
        source,
        spec,
        vocabulary=None,
        batch_size=batch_size,
        windows=windows,
        with_empty=True,
        workers=workers,
    ):
        skipped |= {one.file: one.reason for one in batch.skipped}
        if not len(batch):
            continue
        found = embed_batch(model, batch, modalities=(source.modality,), pooled=True)
        values = found[f"{source.modality}_pooled"]
        names += batch.files[::windows]
        parts.append(values.reshape(-1, windows, values.shape[1]))
    features = Features(names, np.concatenate(parts), skipped, False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        said = json.dumps({"names": names, "skipped": skipped})
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, allow_pickle=False, values=features.values, said=np.array(said))
    return features


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
