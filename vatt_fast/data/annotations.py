"""Captions of retrieval benchmarks, read from their own annotation files: MSR-VTT and YouCook2.

Nothing but the annotation is read; media are found by the videos' names, which have no suffix.
"""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import decode_text, seconds_of
from .source import WHOLE_FILE

_YOUCOOK_SPLITS = {"training": "train", "validation": "val", "testing": "test"}
_MSRVTT_SPLITS = {"train": "train", "validate": "val", "test": "test"}


@dataclass(frozen=True)
class AnnotatedClip:
    """A video or a segment of one, and its sentences."""

    video: str  # name without suffix
    sentences: tuple[str, ...]
    split: str  # train, val or test
    segment: tuple[float, float] = WHOLE_FILE  # seconds


def read_annotations(path: str | os.PathLike) -> list[AnnotatedClip]:
    """MSR-VTT's videodatainfo JSON, its 1k test as CSV (key, vid_key, video_id, sentence), or
    YouCook2's JSON, told by what is in them.

    Clips come in the file's order, MSR-VTT's sentences too.

    Raises:
        ValueError: another file, or a damaged one, with the place.
    """
    path = Path(path)
    try:
        text = decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name another file") from error
    if path.suffix.lower() == ".csv":
        return _msrvtt_test(text, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); take it anew") from error
    if isinstance(content, dict) and isinstance(content.get("database"), dict):
        return _youcook(content["database"], path)
    if isinstance(content, dict) and {"videos", "sentences"} <= content.keys():
        return _msrvtt(content, path)
    raise ValueError(
        f"{path} is neither MSR-VTT's annotation, which has videos and sentences, nor YouCook2's, "
        "which has a database"
    )


def _msrvtt(content: Mapping[str, Any], path: Path) -> list[AnnotatedClip]:
    said: dict[str, list[str]] = {}
    for number, each in enumerate(content["sentences"], 1):
        video, caption = _texts(each, ("video_id", "caption"), f"{path} sentence {number}")
        said.setdefault(video, []).append(caption)
    clips = []
    for number, each in enumerate(content["videos"], 1):
        where = f"{path} video {number}"
        video, split = _texts(each, ("video_id", "split"), where)
        if split not in _MSRVTT_SPLITS:
            raise ValueError(f"{where} has split {split!r}; it is {', '.join(_MSRVTT_SPLITS)}")
        if video in said:
            clips.append(AnnotatedClip(video, tuple(said.pop(video)), _MSRVTT_SPLITS[split]))
    if said:
        raise ValueError(f"{path} has sentences of {next(iter(said))}, which is none of its videos")
    return clips


def _msrvtt_test(text: str, path: Path) -> list[AnnotatedClip]:
    rows = csv.DictReader(text.splitlines())
    if not {"video_id", "sentence"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path} has no columns video_id and sentence; take MSR-VTT's 1k test")
    clips = []
    for line, row in enumerate(rows, 2):
        video, sentence = _texts(row, ("video_id", "sentence"), f"{path} line {line}")
        clips.append(AnnotatedClip(video, (sentence,), "test"))
    return clips


def _youcook(database: Mapping[str, Any], path: Path) -> list[AnnotatedClip]:
    clips = []
    for video, each in database.items():
        where = f"{path}: {video}"
        (subset,) = _texts(each, ("subset",), where)
        if subset not in _YOUCOOK_SPLITS:
            raise ValueError(f"{where} has subset {subset!r}; it is {', '.join(_YOUCOOK_SPLITS)}")
        for step in each.get("annotations", []):
            (sentence,) = _texts(step, ("sentence",), where)
            segment = step.get("segment")
            if not isinstance(segment, list) or len(segment) != 2:
                raise ValueError(f"{where} has the segment {segment!r}; it is [start, end]")
            try:
                start, end = map(seconds_of, segment)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not 0 <= start < end:
                raise ValueError(f"{where} has a segment from {start:g} to {end:g} s; correct it")
            clips.append(AnnotatedClip(video, (sentence,), _YOUCOOK_SPLITS[subset], (start, end)))
    return clips


def _texts(each: Any, names: tuple[str, ...], where: str) -> tuple[str, ...]:
    values = [each.get(name) if isinstance(each, Mapping) else None for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where} has no {name}; take the file anew")
    return tuple(str(value).strip() for value in values)
