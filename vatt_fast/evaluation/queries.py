"""The clips and sentences that text-to-video retrieval is measured by, from annotation files."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..data.annotations import read_annotations
from ..data.captions import composed
from ..data.folder import media_below
from ..data.index import hold
from ..data.listing import Listing, Row
from ..data.media import VIDEO_SUFFIXES
from ..data.source import WHOLE_FILE, Source


@dataclass(frozen=True)
class Queries:
    """Clips to look among, and the sentences that look for them.

    Args:
        source: the clips, each a media file or a segment of one.
        sentences: (name of its clip, sentence).
        missing: videos that are named and not there.
    """

    source: Source
    sentences: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


def read_queries(
    annotations: str | os.PathLike, media: str | os.PathLike, split: str | None = None
) -> Queries:
    """The clips and sentences of an annotation file that ``data.annotations`` reads.

    Args:
        media: folder with the videos, at any depth, named by their ids. A segment cut out is not
            recognised: whole videos are read.
        split: train, val or test; None: test, or val where there is none, as MSR-VTT and YouCook2
            are measured.

    Raises:
        ValueError: a file of another kind, a split that it lacks, two videos with one id, or none
            of the videos there.
    """
    folder = Path(media)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name the one with the videos of {annotations}")
    clips = [clip for clip in read_annotations(annotations) if clip.sentences]
    splits = sorted({clip.split for clip in clips})
    wanted = split or ("test" if "test" in splits else "val")
    clips = [clip for clip in clips if clip.split == wanted]
    if not clips:
        raise ValueError(
            f"{annotations} has no sentences of split {wanted}; "
            f"it has {', '.join(splits) or 'none'}"
        )
    files = _by_id(folder)
    rows: dict[tuple[str, tuple[float, float]], Row] = {}
    sentences, missing = [], []
    for clip in clips:
        found = files.get(composed(clip.video), [])
        if not found:
            missing.append(clip.video)
            continue
        if len(found) > 1:
            raise ValueError(
                f"{annotations} names {clip.video}, and in {folder} there are {found[0]} and "
                f"{found[1]}; move one of them away"
            )
        file = found[0]
        start, end = clip.segment
        name = file if clip.segment == WHOLE_FILE else f"{file}@{start:g}-{end:g}"
        rows.setdefault((file, clip.segment), Row(name, file, clip.segment))
        sentences += [(name, sentence) for sentence in clip.sentences]
    if not rows:
        raise ValueError(
            f"none of the {len(set(missing))} videos of {annotations} is in {folder} "
            f"({missing[0]}, ...); files are named by the videos' ids"
        )
    ordered = [rows[key] for key in sorted(rows)]
    listing = Listing(str(annotations), str(folder), None, ordered)
    return Queries(hold(listing), tuple(sentences), tuple(dict.fromkeys(missing)))


def _by_id(folder: Path) -> dict[str, list[str]]:
    """Paths of media by name and by name without suffix; where there are videos, those alone."""
    found: dict[str, list[str]] = {}
    for path in media_below(folder)[0]:
        name = composed(path.rpartition("/")[2])
        for each in (name, os.path.splitext(name)[0]):
            found.setdefault(each, []).append(path)
    videos = {
        name: [path for path in paths if path.lower().endswith(VIDEO_SUFFIXES)]
        for name, paths in found.items()
    }
    return {name: videos[name] or paths for name, paths in found.items()}
