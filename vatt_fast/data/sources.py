"""Where clips come from: folders, manifests, tar shards, indexes of them, and mixes."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..files import InUseError, check_folder
from .columns import ColumnSource
from .index import build_index, hold, open_index, warn_of_captions
from .index_file import (
    OTHER_FILES,
    asked_of,
    changes,
    holds_shards,
    is_index,
    is_same_listing,
    wanted_of,
)
from .listing import (
    LARGE_CAPTIONS_BYTES,
    Listing,
    Wanted,
    asked_for,
    index_home,
    list_source,
    parse,
)
from .remote import is_url
from .source import MixedSource, Source
from .text import PADDING, UNKNOWN, Vocabulary

# a source of more files than this gets an index on disk, whatever it is
MOST_IN_MEMORY = 20_000
_WAIT_SECONDS = 0.5


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_source(
    data: str | os.PathLike,
    *,
    index_folder: str | os.PathLike | None = None,
    workers: int = 1,
    say: Callable[[str], None] = _to_stderr,
) -> Source:
    """The source that ``data`` names, as ``listing`` describes.

    An index beside the data is used, or the one in ``index_folder``. Where there is none, small
    folders and manifests are held in memory; shards and larger ones get an index, beside the data
    or, where nothing can be written there, in ``index_folder``. What has changed since an index was
    written is read again, and named.

    Args:
        workers: processes that build an index.
        say: takes a line on what is built, and where.

    Raises:
        ValueError: data that name nothing, or hold nothing that can be read.
    """
    wanted = parse(os.fspath(data))
    spare = None if index_folder is None else Path(index_folder)
    opened = [
        _open(each, None if spare is None else spare / str(number), workers, say)
        for number, each in enumerate(wanted)
    ]
    if len(opened) == 1:
        return opened[0]
    pairs = zip(opened, (each.weight for each in wanted), strict=True)
    return MixedSource(list(pairs))


def _open(
    wanted: Wanted, spare: Path | None, workers: int, say: Callable[[str], None]
) -> ColumnSource:
    if not is_url(wanted.text) and is_index(wanted.text):
        return _open_named(Path(wanted.text))
    home = index_home(wanted)
    places = [place for place in (home, spare) if place is not None]
    listing: Listing | None = None
    for place in places:
        if is_index(place):
            asked, now = asked_of(place), asked_for(wanted)
            others = [
                f"{name} are to be taken from {now[name]}"
                for name in asked
                if now[name] not in (None, asked[name])
            ]
            wanted = dataclasses.replace(
                wanted,
                captions=wanted.captions or asked["captions"],
                media=wanted.media or asked["media"],
            )
            shards = None
            if holds_shards(place):
                listing = list_source(wanted)
                shards = listing.shards
            told = others + changes(place, shards)
            if told:
                listing = listing or list_source(wanted)
                if _are_folders(told) and is_same_listing(place, listing):
                    return _warned(open_index(place))
                say(f"the index {place} is brought up to date: {_some(told)}")
                return _warned(_build(listing, place, workers, say))
            return _warned(open_index(place))
    listing = listing or list_source(wanted)
    if not listing.shards and len(listing.rows) <= MOST_IN_MEMORY and not _is_large(listing):
        return _warned(hold(listing))
    for place in places:
        try:
            check_folder(place)
        except ValueError:
            continue
        say(f"{listing.label} is indexed into {place}, once")
        return _warned(_build(listing, place, workers, say))
    raise ValueError(
        f"{listing.label} needs an index, and there is no place for it: vatt-fast index "
        f"{listing.label} --out FOLDER, and name that folder"
    )


def _open_named(folder: Path) -> ColumnSource:
    """An index by its own name, which is not written again."""
    told, wanted = changes(folder), wanted_of(folder)
    if wanted is not None and (told or holds_shards(folder)) and _are_folders(told):
        listing = list_source(wanted)
        told = changes(folder, listing.shards or None)
        if told and _are_folders(told) and is_same_listing(folder, listing):
            told = []
    if told:
        raise ValueError(
            f"the index {folder} is out of date: {_some(told)}; run vatt-fast index on its "
            "source again, which reads only what has changed"
        )
    return _warned(open_index(folder))


def _are_folders(told: list[str]) -> bool:
    """Whether nothing has changed but folders, which hold other files now."""
    return all(each.endswith(OTHER_FILES) for each in told)


def _build(listing: Listing, place: Path, workers: int, say: Callable[[str], None]) -> ColumnSource:
    """Build an index, or wait for the process that does: the ranks of a run all want it."""
    waited = False
    while True:
        try:
            return build_index(listing, place, workers=workers)
        except InUseError as error:
            if not waited:
                say(f"{error}: waiting")
            waited = True
            time.sleep(_WAIT_SECONDS)
        if is_index(place) and not changes(place, listing.shards or None):
            return open_index(place)


def _is_large(listing: Listing) -> bool:
    captions = listing.captions
    if captions is None or captions.is_dir():
        return False
    return captions.stat().st_size > LARGE_CAPTIONS_BYTES


def _warned(source: ColumnSource) -> ColumnSource:
    warn_of_captions(source)
    return source


def _some(told: list[str]) -> str:
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return ", ".join(told[:3]) + more


def vocabulary_from(source: Source, max_words: int) -> Vocabulary:
    """The most frequent words of a source's captions, ties in alphabetical order.

    Only padding and the unknown word where there are none.
    """
    ranked = sorted(source.word_counts(), key=lambda pair: (-pair[1], pair[0]))
    if ranked and max_words < 3:
        raise ValueError(
            f"max_words is {max_words}; {PADDING}, {UNKNOWN} and one word need at least 3"
        )
    return Vocabulary([PADDING, UNKNOWN, *(word for word, _ in ranked[: max_words - 2])])
