"""A page of queries and the clips that answer them, to be opened beside the media."""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ..data.media import IMAGE_SUFFIXES
from ..data.source import Source
from ..files import write_text
from .retrieval import top_k
from .search import Direction

# a browser holds players of all of them
MOST_QUERIES = 25
_NAMES = {"r1": "R@1 (%)", "r5": "R@5 (%)", "r10": "R@10 (%)", "median_rank": "median rank"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h2 { margin-top: 2.5rem } h3 { margin: 1.6rem 0 .4rem; font-size: 1.05rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: left }
.hits { display: flex; flex-wrap: wrap; gap: .8rem }
figure { margin: 0; width: 13.5rem; padding: .35rem; border: 1px solid #bbb; border-radius: 6px;
  box-sizing: border-box }
figure.right { border: 3px solid #009E73; padding: calc(.35rem - 2px) }
video, img { width: 100%; background: #000; display: block } audio { width: 100% }
figcaption { font-size: .82rem; overflow-wrap: anywhere; margin-top: .3rem }
.rank { color: #555; font-weight: normal }
"""


@dataclass(frozen=True)
class Answer:
    """One query and its hits: what was asked, what was found, and which hits are right.

    Args:
        hits: (what, similarity, is right), best first.
        rank: of the right target, where that is known.
    """

    asked: str
    hits: tuple[tuple[str, float, bool], ...]
    rank: int | None = None


def answers_of(direction: Direction, top: int, most: int = MOST_QUERIES) -> list[Answer]:
    """The ``top`` hits of at most ``most`` queries, evenly spaced among all."""
    count = len(direction.right)
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    queries = direction.queries[chosen]
    best = top_k(queries, direction.targets, min(top, len(direction.targets)))
    ranks = direction.ranks()[chosen]
    found = []
    for query, row, query_vector, rank in zip(chosen, best, queries, ranks, strict=True):
        right = set(direction.right[query])
        hits = tuple(
            (direction.found[i], float(query_vector @ direction.targets[i]), int(i) in right)
            for i in row
        )
        found.append(Answer(direction.asked[query], hits, int(rank)))
    return found


def write_page(
    path: str | os.PathLike,
    source: Source,
    sections: Mapping[str, Sequence[Answer]],
    results: Mapping[str, Any],
    about: str,
) -> None:
    """Write one page of HTML that plays the clips where they lie, by relative links.

    Args:
        source: what the files' names belong to. Members of a tar have no address that a browser
            could open, and are only named.
        sections: by direction, such as "text_to_video"; its two ends say what is a text.
        results: what ``results_of`` gives, for the directions that it has.
        about: a line on how this was measured.
    """
    path = Path(path)
    media = {source.name(number): number for number in range(len(source))}
    write = _Writer(source, media, path.absolute().parent)
    parts = []
    for name, answers in sections.items():
        asking, answering = name.split("_to_")
        parts.append(f"<h2>{html.escape(name.replace('_', ' ').capitalize())}</h2>\n")
        if isinstance(told := results.get(name), dict):
            rows = "".join(
                f"<tr><th>{_NAMES.get(key, key)}</th><td>{value:.4g}</td></tr>"
                for key, value in told.items()
            )
            parts.append(f"<table>{rows}</table>\n")
            if told["queries"] > len(answers):
                shown = f"{len(answers)} of {told['queries']} queries, evenly spaced"
                parts.append(f"<p>{shown}.</p>\n")
        parts += [write.answer(answer, asking, answering) for answer in answers]
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>Retrieval</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Retrieval</h1>\n"
        f"<p>{html.escape(about)} A right clip has a thick green frame.</p>\n"
        + "".join(parts)
        + "</body>\n</html>\n",
    )


class _Writer:
    def __init__(self, source: Source, media: dict[str, int], folder: Path) -> None:
        self.source, self.media, self.folder = source, media, folder

    def answer(self, answer: Answer, asking: str, answering: str) -> str:
        rank = "" if answer.rank is None else f' <span class="rank">rank {answer.rank}</span>'
        if asking == "text":
            asked = f"<h3>&ldquo;{_escape(answer.asked)}&rdquo;{rank}</h3>\n"
        else:
            player = self._player(answer.asked, asking)
            asked = f"<h3>{_escape(answer.asked)}{rank}</h3>\n<figure>{player}</figure><br>\n"
        hits = []
        for place, (what, similarity, right) in enumerate(answer.hits, 1):
            shown = "" if answering == "text" else self._player(what, answering)
            mark = ", right" if right else ""
            hits.append(
                f"<figure{_RIGHT if right else ''}>{shown}<figcaption><b>{place}{mark}</b> "
                f"{_escape(what)} ({similarity:.3f})</figcaption></figure>"
            )
        return f'{asked}<div class="hits">{"".join(hits)}</div>\n'

    def _player(self, name: str, modality: str) -> str:
        """Of a file, as far as a browser can open it."""
        number = self.media.get(name)
        address = self._outside(name) if number is None else self._address(number)
        if address is None:
            return ""
        if name.partition("@")[0].lower().endswith(IMAGE_SUFFIXES):
            return f'<img src="{address}" alt="{_escape(name)}">'
        tag = "audio" if modality == "audio" else "video"
        return f'<{tag} controls preload="metadata" src="{address}"></{tag}>'

    def _address(self, number: int) -> str | None:
        place = self.source.place(number)
        if place.is_part:
            return None
        start, end = self.source.segment(number)
        until = "" if end == float("inf") else f",{end:g}"
        at = f"#t={start:g}{until}" if start or until else ""
        if place.is_remote:
            return html.escape(place.path) + at if place.path.startswith("http") else None
        return self._relative(place.path) + at

    def _outside(self, name: str) -> str | None:
        return self._relative(name) if os.path.exists(name) else None

    def _relative(self, path: str) -> str:
        return quote(os.fsencode(os.path.relpath(os.path.abspath(path), self.folder)))


_RIGHT = ' class="right"'


def _escape(text: str) -> str:
    """With the odd bytes of a file's name shown, which UTF-8 cannot hold."""
    return html.escape(text.encode(errors="backslashreplace").decode())
