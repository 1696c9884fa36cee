"""Searching a folder by sentences or a sound, and measuring how well that works (paper 4.4)."""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.clips import ClipSpec
from ..data.folder import composed
from ..data.loader import evaluation_clips
from ..data.source import Source
from ..data.sources import open_source
from ..data.text import read_json, split_words
from ..encoding import Protocol, embed_batch, embed_sentences, without_known_words
from ..model import VATT
from .queries import Queries
from .retrieval import metrics_of_ranks, retrieval_ranks, top_k

QUERIES = "queries.json"
# the protocol's: evenly spaced over a clip, their embeddings averaged, then of unit norm
WINDOWS = 4


@dataclasses.dataclass(frozen=True)
class EmbeddedFolder:
    """The embeddings of a folder, or of another source: arrays (N, d), nan for a missing stream.

    Args:
        files: names of the N examples.
        numbers: (N,) their numbers in the source; those that cannot be read are not there.
        seconds: (N, windows) where each window begins in its file.
        skipped: names of what could not be read, and why.
    """

    source: Source
    files: list[str]
    numbers: np.ndarray
    video_va: np.ndarray
    video_vt: np.ndarray
    audio_va: np.ndarray
    seconds: np.ndarray
    skipped: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Direction:
    """One way to search, such as text to video: Q queries, N targets.

    Args:
        queries, targets: (Q, d) and (N, d).
        asked, found: what each is called: sentences, or files' names.
        right: numbers of each query's right targets.
    """

    queries: np.ndarray
    targets: np.ndarray
    asked: Sequence[str]
    found: Sequence[str]
    right: Sequence[Sequence[int]]

    def ranks(self) -> np.ndarray:
        """(Q,) from 1 on."""
        return retrieval_ranks(self.queries, self.targets, self.right)


def read_folder(
    model: VATT,
    data: str | os.PathLike | Source,
    *,
    windows: int = WINDOWS,
    batch_size: int = 32,
    protocol: Protocol = "paper",
) -> EmbeddedFolder:
    """Embed the video and sound of a folder or source.

    Args:
        protocol: how a file's windows become one embedding. "paper": the mean of the raw ones,
            brought to unit norm. "cosines": the mean of unit vectors, so that a dot product is the
            mean of the windows' cosines; the release reports both.

    Raises:
        ValueError: as ``evaluation_clips``.
    """
    spec = ClipSpec.from_config(model.config)
    source = open_source(data) if isinstance(data, str | os.PathLike) else data
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    files: list[str] = []
    skipped: dict[str, str] = {}
    for batch in evaluation_clips(
        source, spec, vocabulary=None, batch_size=batch_size, windows=windows, with_empty=True
    ):
        skipped |= {one.file: one.reason for one in batch.skipped}
        if not len(batch):
            continue
        files += batch.files[::windows]
        found = embed_batch(
            model, batch, modalities=("video", "audio"), windows=windows, protocol=protocol
        )
        found["seconds"] = batch.start_seconds.numpy().reshape(-1, windows)
        for name, value in found.items():
            parts[name].append(value)
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    number_of = {source.name(number): number for number in range(len(source))}
    return EmbeddedFolder(
        source,
        files,
        np.array([number_of[name] for name in files]),
        arrays["z_video_va"],
        arrays["z_video_vt"],
        arrays["z_audio_va"],
        arrays["seconds"],
        skipped,
    )


def require_known_words(model: VATT, sentences: Sequence[str]) -> None:
    """Raises ValueError for sentences of which the model knows no word: nothing answers them."""
    if sentences and (unknown := without_known_words(model, sentences)):
        raise ValueError(
            f"the model knows no word of {', '.join(map(repr, unknown))}; "
            "its words are in vocabulary.txt"
        )


def best_clips(query: np.ndarray, embeddings: np.ndarray, files: Sequence[str], top: int) -> dict:
    """{file: similarity} of the ``top`` clips most similar to a query (d,), best first.

    Clips without the stream, whose rows are nan, are left out. Raises ValueError where none has it.
    """
    seen = np.flatnonzero(np.isfinite(embeddings).all(1))
    if not seen.size:
        raise ValueError("no clip of the folder has a picture to look for")
    best = seen[top_k(query[None], embeddings[seen], min(top, seen.size))[0]]
    return {files[i]: round(float(query @ embeddings[i]), 4) for i in best}


def measure(model: VATT, data: str | os.PathLike, folder: EmbeddedFolder) -> dict[str, Any]:
    """Retrieval by a folder's own sentences and sounds: see ``directions`` and ``results_of``."""
    return results_of(*directions(model, data, folder))


def results_of(found: dict[str, Direction], left_out: dict[str, Any]) -> dict[str, Any]:
    """{"text_to_video": metrics and the number of queries, ...}, and what was left out, if any."""
    results: dict[str, Any] = {
        name: {"queries": len(direction.right), **metrics_of_ranks(direction.ranks())}
        for name, direction in found.items()
    }
    return results | ({"left_out": left_out} if left_out else {})


def directions(
    model: VATT, data: str | os.PathLike, folder: EmbeddedFolder, queries: Queries | None = None
) -> tuple[dict[str, Direction], dict[str, Any]]:
    """What a folder can be asked: text to video, audio to video, and both in reverse.

    The sentences are those of an annotation file, or of queries.json, one a file, or else the
    captions that lie in a window that was embedded: of a long file the others speak of what nobody
    looked at. A video that has several sentences may find any of them.

    Args:
        queries: of an annotation file, whose clips are ``folder``'s.

    Returns:
        "text_to_video" and so on, as far as there are queries; and what could not be asked, why.

    Raises:
        ValueError: nothing to ask with, or a queries.json of another kind.
    """
    left_out: dict[str, Any] = {}
    if folder.skipped:
        left_out["unreadable files"] = sorted(folder.skipped)
    if queries is not None:
        if queries.missing:
            left_out["videos that are not there"] = sorted(queries.missing)
        place_of = {name: i for i, name in enumerate(folder.files)}
        sentences = [(place_of[n], text) for n, text in queries.sentences if n in place_of]
        _note(left_out, "sentences of unreadable files", len(queries.sentences) - len(sentences))
    elif (Path(data) / QUERIES).is_file():
        sentences = _given_queries(Path(data) / QUERIES, folder, left_out)
    else:
        sentences = _captions_in_windows(model, folder, left_out)
    with_words = [(i, sentence) for i, sentence in sentences if split_words(sentence)]
    _note(left_out, "sentences without words", len(sentences) - len(with_words))
    video = np.isfinite(folder.video_vt).all(1)
    sentences = [(i, sentence) for i, sentence in with_words if video[i]]
    _note(left_out, "sentences of files without a picture", len(with_words) - len(sentences))
    found: dict[str, Direction] = {}
    if sentences:
        texts = [sentence for _, sentence in sentences]
        pairs = [(query, i) for query, (i, _) in enumerate(sentences)]
        embedded = embed_sentences(model, texts)
        found |= _both_ways(
            ("text", embedded, texts), ("video", folder.video_vt, folder.files), pairs, video
        )
    both = video & np.isfinite(folder.audio_va).all(1)
    if both.any():
        own = [(place, int(i)) for place, i in enumerate(np.flatnonzero(both))]
        sounds = [folder.files[i] for _, i in own]
        found |= _both_ways(
            ("audio", folder.audio_va[both], sounds),
            ("video", folder.video_va, folder.files),
            own,
            video,
        )
    if not found:
        raise ValueError(
            f"{data} has neither captions nor sound to query with; give --text or --audio"
        )
    return found, left_out


def _both_ways(
    queries: tuple[str, np.ndarray, Sequence[str]],
    targets: tuple[str, np.ndarray, Sequence[str]],
    pairs: Sequence[tuple[int, int]],
    among: np.ndarray,
) -> dict[str, Direction]:
    """There, among the targets that are marked; and back, from those that any query belongs to."""
    (asking, asked_by, names), (answering, answers, files) = queries, targets
    place = np.cumsum(among) - 1  # number among the marked ones
    right = [[int(place[target])] for _, target in pairs]
    there = Direction(
        asked_by, answers[among], names, [files[int(i)] for i in np.flatnonzero(among)], right
    )
    of_target: dict[int, list[int]] = defaultdict(list)
    for query, target in pairs:
        of_target[int(target)].append(query)
    targets_asked = sorted(of_target)
    back = Direction(
        answers[targets_asked],
        asked_by,
        [files[i] for i in targets_asked],
        names,
        [of_target[i] for i in targets_asked],
    )
    return {f"{asking}_to_{answering}": there, f"{answering}_to_{asking}": back}


def _given_queries(
    path: Path, folder: EmbeddedFolder, left_out: dict[str, Any]
) -> list[tuple[int, str]]:
    given = read_json(path)
    if not isinstance(given, dict) or not all(isinstance(s, str) for s in given.values()):
        raise ValueError(f"{path} is no object of {{file: sentence}}; rewrite it")
    index = {composed(name): i for i, name in enumerate(folder.files)}
    index |= {name: i for i, name in enumerate(folder.files)}
    found = {name: index.get(name, index.get(composed(name))) for name in given}
    skipped = {composed(name) for name in folder.skipped}
    missing = [name for name, i in found.items() if i is None and composed(name) not in skipped]
    if missing:
        left_out[f"names in {path.name} of no file"] = sorted(missing)
    return [(i, given[name]) for name, i in found.items() if i is not None]


def _captions_in_windows(
    model: VATT, folder: EmbeddedFolder, left_out: dict[str, Any]
) -> list[tuple[int, str]]:
    seconds = ClipSpec.from_config(model.config).seconds
    inside, outside = [], 0
    for i, number in enumerate(folder.numbers):
        captions = folder.source.captions(int(number))
        starts = folder.seconds[i]
        for (start, end), text in zip(captions.times, captions.texts, strict=True):
            if ((start < starts + seconds) & (end >= starts)).any():
                inside.append((i, text))
            else:
                outside += 1
    _note(left_out, "captions outside the windows embedded", outside)
    return inside


def _note(left_out: dict[str, Any], what: str, count: int) -> None:
    if count:
        left_out[what] = count
