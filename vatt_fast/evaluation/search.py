"""Searching clips by sentences or a sound, and measuring how well that works (paper 4.4)."""

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.clips import ClipSpec
from ..data.loader import evaluation_clips
from ..data.source import Captions, Source
from ..data.sources import open_source
from ..data.text import composed, read_json, split_words
from ..encoding import Protocol, embed_batch, embed_sentences, without_known_words
from ..model import VATT
from ..training.distributed import Ranks
from .queries import Queries
from .retrieval import metrics_of_ranks, retrieval_ranks, top_k

QUERIES = "queries.json"
# the protocol's: evenly spaced over a clip, their embeddings averaged, then of unit norm
WINDOWS = 4


@dataclasses.dataclass(frozen=True)
class EmbeddedFolder:
    """Embeddings of a source's clips: arrays (N, d), nan for a missing stream.

    ``files`` are their names. ``seconds`` are each clip's windows, (N, windows) of their beginnings
    in its file. Embeddings are of unit norm but for protocol "cosines".
    """

    source: Source
    files: list[str]
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
    ranks: Ranks | None = None,
) -> EmbeddedFolder:
    """Embed the video and sound of what ``open_source`` takes, or of a ``Source``.

    Args:
        protocol: how a file's windows become one embedding. "paper": the mean of the raw ones,
            brought to unit norm. "cosines": the mean of unit vectors, so that a dot product is the
            mean of the windows' cosines; the release reports both.
        ranks: processes that divide the batches; all call, and get the whole.

    Raises:
        ValueError: as ``evaluation_clips``; batch_size below 1.
    """
    ranks = ranks or Ranks()
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
    source = open_source(data) if isinstance(data, str | os.PathLike) else data
    span: dict[str, int] = {}
    if ranks.world > 1:
        batches = -(-len(source) // batch_size)
        first, stop = (batches * (ranks.rank + i) // ranks.world for i in (0, 1))
        span = dict(first=first, stop=stop)
    spec = ClipSpec.from_config(model.config)
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    files: list[str] = []
    skipped: dict[str, str] = {}
    options: dict[str, Any] = dict(batch_size=batch_size, windows=windows, **span)
    for batch in evaluation_clips(source, spec, vocabulary=None, with_empty=True, **options):
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
    shares = ranks.all((files, skipped, dict(parts)))
    files = [name for share in shares for name in share[0]]
    skipped = {name: why for share in shares for name, why in share[1].items()}
    names = dict.fromkeys(name for share in shares for name in share[2])
    arrays = {
        name: np.concatenate([one for share in shares for one in share[2].get(name, ())])
        for name in names
    }
    if not files:
        raise ValueError(f"none of the {len(skipped)} files of {source.label} can be read")
    return EmbeddedFolder(
        source,
        files,
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
        raise ValueError("no clip has a picture to look for")
    best = seen[top_k(query[None], embeddings[seen], min(top, seen.size))[0]]
    return {files[i]: round(float(query @ embeddings[i]), 4) for i in best}


def measure(
    model: VATT, data: str | os.PathLike | Source, folder: EmbeddedFolder
) -> dict[str, Any]:
    """Retrieval by the clips' own sentences and sounds: see ``directions`` and ``results_of``."""
    return results_of(*directions(model, data, folder))


def results_of(found: dict[str, Direction], left_out: dict[str, Any]) -> dict[str, Any]:
    """{"text_to_video": metrics and the number of queries, ...}, and what was left out, if any."""
    results: dict[str, Any] = {
        name: {"queries": len(direction.right), **metrics_of_ranks(direction.ranks())}
        for name, direction in found.items()
    }
    return results | ({"left_out": left_out} if left_out else {})


def queries_digest(found: dict[str, Direction]) -> str:
    """One number for what was asked, and what may answer it."""
    told = {
        name: [list(way.asked), list(way.found), [list(map(int, each)) for each in way.right]]
        for name, way in found.items()
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def directions(
    model: VATT,
    data: str | os.PathLike | Source,
    folder: EmbeddedFolder,
    queries: Queries | None = None,
) -> tuple[dict[str, Direction], dict[str, Any]]:
    """What clips can be asked: text to video, audio to video, and both in reverse.

    The sentences are those of an annotation file, or of queries.json in the folder ``data``, one a
    clip by its name, or else the captions that lie in a window that was embedded: of a long file
    the others speak of what nobody looked at. A video with several sentences may find any of them.

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
    queries_file = _queries_file(data)
    if queries is not None:
        if queries.missing:
            left_out["videos that are not there"] = sorted(queries.missing)
        place_of = {name: i for i, name in enumerate(folder.files)}
        sentences = [(place_of[n], text) for n, text in queries.sentences if n in place_of]
        _note(left_out, "sentences of unreadable files", len(queries.sentences) - len(sentences))
    elif queries_file is not None:
        sentences = _given_queries(queries_file, folder, left_out)
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
            f"{folder.source.label} has neither captions nor sound to query with; give --text or "
            "--audio"
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


def _queries_file(data: str | os.PathLike | Source) -> Path | None:
    """queries.json of a folder, where it has one; with "/**" the folder is the one named."""
    if not isinstance(data, str | os.PathLike):
        return None
    path = Path(os.fspath(data).removesuffix("/**")) / QUERIES
    return path if path.is_file() else None


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
    source = folder.source
    number_of = {source.name(number): number for number in range(len(source))}
    seconds = ClipSpec.from_config(model.config).seconds
    inside, outside = [], 0
    for i, name in enumerate(folder.files):
        captions = source.captions(number_of[name])
        for place, text in enumerate(captions.texts):
            if _overlaps(captions, place, folder.seconds[i], seconds):
                inside.append((i, text))
            else:
                outside += 1
    _note(left_out, "captions outside the windows embedded", outside)
    return inside


def _overlaps(captions: Captions, place: int, starts: np.ndarray, seconds: float) -> bool:
    begins, ends = captions.times[place]
    return bool(((begins < starts + seconds) & (ends >= starts)).any())


def _note(left_out: dict[str, Any], what: str, count: int) -> None:
    if count:
        left_out[what] = count
