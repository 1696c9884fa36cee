"""Embedding all clips into one file, a batch at a time; may be killed and continued."""

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from .. import __version__
from ..data.clips import ClipSpec
from ..data.loader import evaluation_clips
from ..data.remote import size_and_time
from ..data.source import Source
from ..data.sources import open_source
from ..encoding import embed_batch
from ..model import VATT
from ..training.distributed import Ranks
from .parts import begin, part_path, spans, write_part, written


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What ``embed_folder`` wrote: the file, how many clips, which ones were skipped and why.

    ``continued`` says whether a killed run was continued.
    """

    path: Path
    files: int
    skipped: dict[str, str]
    continued: bool


def embed_folder(
    model: VATT,
    data: str | os.PathLike | Source,
    out: str | os.PathLike,
    *,
    batch_size: int = 32,
    windows: int = 1,
    pooled: bool = False,
    features: bool = False,
    ranks: Ranks | None = None,
) -> Embedded:
    """Embed every clip of a folder, or of another source, into an .npz file: whole or absent.

    Each batch is written beside it, into ``<out>.parts``, so memory stays that of one batch. The
    same call after a kill goes on behind the last batch, if model, files and settings are the same;
    otherwise it begins anew. In the end the parts become the file and go.

    Args:
        data: what ``open_source`` takes, or a ``Source``.
        windows, pooled, features: as in ``encoding.embed_batch``.
        ranks: processes that divide the batches; all call, with a model each. Any number of them
            may go on with what was begun.

    Raises:
        ValueError: an output that cannot be written, said before the work; settings that do not
            fit; and as ``evaluation_clips``.
        OSError: the disk is full; parts stay, and the same call goes on.
    """
    ranks = ranks or Ranks()
    out = Path(out)
    with ranks.together():
        out = checked_output(out)
        if features and windows > 1:
            raise ValueError("features belong to one window; leave windows at 1, or features out")
        source = open_source(data) if isinstance(data, str | os.PathLike) else data
        parts = out.with_name(out.name + ".parts")
        settings = dict(batch_size=batch_size, windows=windows, pooled=pooled, features=features)
        plan = json.dumps({"model": model_digest(model), "data": _data(source), **settings})
    ranks.require_alike({"work": plan})
    with ranks.together():
        continued = ranks.first and begin(parts, plan)
    ranks.any()  # the folder is there
    batches = -(-len(source) // batch_size)
    missing = [n for n in range(batches) if not part_path(parts, n).exists()]
    # while others write already, all must see the same
    missing = ranks.firsts(missing)
    mine = missing[ranks.rank * len(missing) // ranks.world :]
    mine = mine[: (ranks.rank + 1) * len(missing) // ranks.world - (len(missing) - len(mine))]
    for first, stop in spans(mine):
        found = evaluation_clips(
            source,
            ClipSpec.from_config(model.config),
            vocabulary=model.vocabulary,
            batch_size=batch_size,
            windows=windows,
            first=first,
            stop=None if (first, stop) == (0, batches) else stop,
            with_empty=True,
        )
        for number, one in enumerate(_embedded(model, found, windows, pooled, features), first):
            write_part(parts, number, *one)
    with ranks.together():  # and all are done
        pass
    whole = Embedded(out, 0, {}, False)
    with ranks.together():
        if ranks.first:
            whole = dataclasses.replace(_join(parts, out), continued=continued)
    return ranks.firsts(whole)


def checked_output(out: str | os.PathLike) -> Path:
    """The .npz file to write, ending so. Raises ValueError where it cannot be written."""
    out = Path(out)
    if out.suffix != ".npz":
        out = out.with_name(out.name + ".npz")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file to write")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder; make it, or write {out.name} elsewhere")
    try:
        # tried, since to root the rights of a folder say nothing
        trial = out.with_name(f".{out.name}.{os.getpid()}.part")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror})") from error
    return out


def _embedded(
    model: VATT, batches: Iterator, windows: int, pooled: bool, features: bool
) -> Iterator[tuple[dict[str, np.ndarray], list[str], dict[str, str]]]:
    modalities = ("video", "audio") if model.vocabulary is None else ("video", "audio", "text")
    for batch in batches:
        options: dict[str, Any] = dict(windows=windows, pooled=pooled, features=features)
        found = embed_batch(model, batch, modalities=modalities, **options) if len(batch) else {}
        skipped = {one.file: one.reason for one in batch.skipped}
        yield found, list(batch.files[::windows]), skipped


def model_digest(model: VATT) -> str:
    """One number for a model's weights and words."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    words = () if model.vocabulary is None else model.vocabulary.words
    digest.update("\n".join(words).encode())
    return digest.hexdigest()


def computed_with(model: torch.nn.Module) -> dict[str, Any]:
    """Device and versions, which results name beside their settings."""
    return {
        "device": str(next(model.parameters()).device),
        "versions": {"vatt_fast": __version__, "torch": torch.__version__},
    }


def _data(source: Source) -> str:
    """One number for a source's clips and captions, and for when its files were written."""
    digest = hashlib.sha256(" ".join(map(str, source.identity)).encode())
    last = None
    for index in range(len(source)):
        path = source.place(index).path
        if path == last:  # the clips of a shard lie together
            continue
        last = path
        try:
            digest.update(f"{size_and_time(path)}\n".encode())
        except OSError:
            continue  # it will be skipped and listed
    return digest.hexdigest()


def _join(parts: Path, out: Path) -> Embedded:
    """Write all parts into one .npz, an array after the other, and remove them."""
    paths = written(parts)
    files: list[str] = []
    skipped: dict[str, str] = {}
    rows: dict[str, int] = {}
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for path in paths:
        with np.load(path) as part:
            said = json.loads(str(part["said"]))
            files += said["files"]
            skipped |= said["skipped"]
            for name in part.files:
                if name != "said":
                    rows[name] = rows.get(name, 0) + len(said["files"])
                    if name not in shapes:
                        shapes[name] = (part[name].shape[1:], part[name].dtype)
    if not files:
        shutil.rmtree(parts)
        raise ValueError(f"none of the {len(skipped)} files can be read; nothing is written")
    whole = out.with_name(f".{out.name}.part")
    try:
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("files.npy", "w", force_zip64=True) as file:
                npy.write_array(file, np.array(files), allow_pickle=False)
            for name, (shape, dtype) in shapes.items():
                header = {
                    "descr": npy.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (rows[name], *shape),
                }
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    npy.write_array_header_2_0(file, header)
                    for path in paths:
                        with np.load(path) as part:
                            if name in part.files:
                                file.write(np.ascontiguousarray(part[name]).data)
        with open(whole, "rb") as file:
            os.fsync(file.fileno())
        whole.replace(out)
    finally:
        whole.unlink(missing_ok=True)
    shutil.rmtree(parts)
    return Embedded(out, len(files), skipped, False)
