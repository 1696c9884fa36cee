"""The annotation files that text-to-video retrieval is measured by: MSR-VTT and YouCook2."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.captions import composed, decode_text, table_rows
from ..data.folder import media_below
from ..data.index import hold
from ..data.listing import Listing, Row
from ..data.source import WHOLE_FILE, Source
from ..data.text import read_json

_KINDS = (
    "MSR-VTT's JSON (videos, sentences), its table of 1000 pairs (video_id, sentence), YouCook2's "
    "JSON (database), or a table of its segments (video_id, start, end, text)"
)


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


@dataclass(frozen=True)
class _Pair:
    video: str
    sentence: str
    where: str
    segment: tuple[float, float] = WHOLE_FILE


def read_queries(
    annotations: str | os.PathLike, media: str | os.PathLike, split: str | None = None
) -> Queries:
    """The clips and sentences of an annotation file, as its publishers wrote it.

    Kinds: MSR-VTT's ``*_videodatainfo.json`` and the table of the 1000 pairs of its test
    (``video_id, sentence``); YouCook2's ``youcookii_annotations*.json``, whose segments are the
    clips, and a table of such segments (``video_id, start, end, text``).

    Args:
        media: folder with the videos, at any depth, named by their ids. A segment cut out is not
            recognised: whole videos are read.
        split: of a JSON file; None: "test" of MSR-VTT and "validation" of YouCook2, as they are
            measured.

    Raises:
        ValueError: a file of another kind, an empty split, or none of the videos there.
    """
    path, folder = Path(annotations), Path(media)
    if not path.is_file():
        raise ValueError(f"{path} is no file; name the annotations")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name the one with the videos of {path}")
    is_json = path.suffix.lower() == ".json"
    pairs = list(_from_json(path, split) if is_json else _from_table(path, split))
    if not pairs:
        raise ValueError(f"{path} has no sentences; name another file of annotations")
    files = _by_id(folder)
    rows: dict[tuple[str, tuple[float, float]], Row] = {}
    sentences, missing = [], []
    for pair in pairs:
        if (file := files.get(composed(pair.video))) is None:
            missing.append(pair.video)
            continue
        start, end = pair.segment
        whole = pair.segment == WHOLE_FILE
        name = file if whole else f"{file}@{start:g}-{end:g}"
        rows.setdefault((file, pair.segment), Row(name, file, pair.segment))
        sentences.append((name, pair.sentence))
    if not rows:
        raise ValueError(
            f"none of the {len(set(missing))} videos of {path} is in {folder} ({missing[0]}, ...); "
            "files are named by the videos' ids"
        )
    listing = Listing(str(path), str(folder), None, [rows[key] for key in sorted(rows)])
    return Queries(hold(listing), tuple(sentences), tuple(dict.fromkeys(missing)))


def _from_json(path: Path, split: str | None) -> Iterator[_Pair]:
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("database"), dict):
        yield from _youcook2(value["database"], str(path), split or "validation")
    elif isinstance(value, dict) and isinstance(value.get("sentences"), list):
        yield from _msrvtt(value, str(path), split or "test")
    else:
        raise ValueError(f"{path} is not of a kind that is read here: {_KINDS}")


def _youcook2(database: dict[str, Any], where: str, split: str) -> Iterator[_Pair]:
    found = {
        _value(video, "subset", str, f"{where}: {name!r}"): None for name, video in database.items()
    }
    if split not in found:
        raise ValueError(f"{where} has the splits {', '.join(found)}, and not {split}")
    for name, video in database.items():
        if video["subset"] != split:
            continue
        for number, each in enumerate(_value(video, "annotations", list, f"{where}: {name!r}")):
            at = f"{where}: {name!r} annotation {number}"
            times = _value(each, "segment", list, at)
            if len(times) != 2:
                raise ValueError(f"{at} has the segment {times}; it is a start and an end")
            yield _Pair(name, _value(each, "sentence", str, at), at, _span(times[0], times[1], at))


def _msrvtt(value: dict[str, Any], where: str, split: str) -> Iterator[_Pair]:
    wanted = None
    if isinstance(value.get("videos"), list):
        split_of = {
            _value(video, "video_id", str, f"{where} videos[{i}]"): video.get("split")
            for i, video in enumerate(value["videos"])
        }
        wanted = {name for name, its in split_of.items() if its == split}
        if not wanted:
            told = ", ".join(sorted({str(its) for its in split_of.values()}))
            raise ValueError(f"{where} has the splits {told}, and not {split}")
    for i, each in enumerate(value["sentences"]):
        at = f"{where} sentences[{i}]"
        video = _value(each, "video_id", str, at)
        if wanted is None or video in wanted:
            yield _Pair(video, _value(each, "caption", str, at), at)


def _from_table(path: Path, split: str | None) -> Iterator[_Pair]:
    if split is not None:
        raise ValueError(f"{path} is a table, which has no splits; leave --split out")
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    for line, row in table_rows(decode_text(path.read_bytes(), str(path)), str(path), separator):
        at = f"{path} line {line}"
        text = next((row[name] for name in ("sentence", "text", "caption") if name in row), None)
        if "video_id" not in row or text is None:
            raise ValueError(f"{path} has the columns {', '.join(row)}; read here is {_KINDS}")
        segment = WHOLE_FILE
        if "start" in row and "end" in row:
            segment = _span(row["start"], row["end"], at)
        yield _Pair(row["video_id"].strip(), text, at, segment)


def _value(entry: Any, name: str, kind: type, where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where} has no {name}; read here is {_KINDS}")
    return value


def _span(start: Any, end: Any, where: str) -> tuple[float, float]:
    try:
        span = float(start), float(end)
    except (TypeError, ValueError):
        span = (math.nan, math.nan)
    if not 0 <= span[0] < span[1] < math.inf:
        raise ValueError(
            f"{where} has a segment from {json.dumps(start)} to {json.dumps(end)} s; it begins at "
            "0 or later and ends after its start"
        )
    return span


def _by_id(folder: Path) -> dict[str, str]:
    """Paths of media by name and by name without suffix; the first in order where two share one."""
    found: dict[str, str] = {}
    for path in media_below(folder)[0]:
        name = composed(path.rpartition("/")[2])
        found.setdefault(name, path)
        found.setdefault(os.path.splitext(name)[0], path)
    return found
