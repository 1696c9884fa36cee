"""Captions as other programs write them: SRT, WebVTT, tables, HowTo100M's and shards' JSON.

Every reader takes what names the file in messages (``where``), and raises ValueError with file,
line and remedy. Times are seconds. Texts come out in Unicode's composed form (NFC), without
mark-up.
A caption without times of its own belongs to the whole file: from 0 to inf.
"""

import codecs
import csv
import html
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .text import (
    Caption,
    caption_of,
    composed,
    is_writable,
    kind_of,
    read_json,
    refuse_repeats,
    writable,
)

# Beside a media file, by its name with another suffix; ``chosen`` says which counts.
SIDECARS = (".srt", ".vtt", ".csv", ".tsv", ".json", ".txt")
# "talk.en.vtt": captions in a language, as download programs call them
_MOST_LANGUAGE_LETTERS = 10
# Latin, Cyrillic, Hangul and so on put spaces between words; these do not.
_WITHOUT_SPACES = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Han
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff]"  # Thai, Lao, Tibetan, Burmese, Khmer
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def has_no_spaces(text: str) -> bool:
    """Whether a text is in a script that puts no spaces between words."""
    return not text.isascii() and _WITHOUT_SPACES.search(text) is not None


def read_sidecar(path: str, data: bytes, where: str) -> list[Caption]:
    """The captions in a file beside a media file, or in the same shard; ``path`` has its suffix."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".json":
        return from_json(parse_json(data, where), where)
    text = decode_text(data, where)
    if suffix == ".txt":
        return _clean([Caption(0.0, math.inf, text)])
    if suffix in (".csv", ".tsv"):
        return from_table(text, where, "\t" if suffix == ".tsv" else ",")
    return (from_vtt if suffix == ".vtt" else from_srt)(text, where)


def key_of(name: str) -> str:
    """webdataset's key: the name up to the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


class Sidecars:
    """Which of some files hold captions, in a folder or a tar, by the media beside them.

    "talk.srt" and "talk.en.srt" belong to talk.mp4; "b.txt" also to the others of its key, as
    b.left.mp4.
    """

    def __init__(self, names: Iterable[str]) -> None:
        ranked: dict[str, list[tuple[int, bool, str]]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in SIDECARS:
                continue
            rank = SIDECARS.index(suffix.lower())
            ranked.setdefault(composed(stem), []).append((rank, False, name))
            bare, _, language = stem.rpartition(".")
            if suffix.lower() in SIDECARS[:2] and _is_language(language) and bare:
                ranked.setdefault(composed(bare), []).append((rank, True, name))
        self._ranked = {stem: sorted(each) for stem, each in ranked.items()}

    def of(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The files of a media file's whole name, then those of its key, each the best first."""
        whole, key = composed(os.path.splitext(name)[0]), composed(key_of(name))
        found = [tuple(file for *_, file in self._ranked.get(whole, ()))]
        if key != whole:  # "b.right.srt" may be of b.right.mp4
            found.append(tuple(file for _, of, file in self._ranked.get(key, ()) if not of))
        return tuple(filter(None, found))


def _is_language(word: str) -> bool:
    return 2 <= len(word) <= _MOST_LANGUAGE_LETTERS and "/" not in word


def chosen(files: Iterable[Sequence[str]], read: Callable[[str], list[Caption]]) -> list[Caption]:
    """Timed captions where there are some, else those of the whole file, .txt before .json.

    Args:
        files: as ``Sidecars.of`` gives them; the first that have captions count.
    """
    for names in files:
        found: list[Caption] = []
        for name in names:
            if not (found and math.isfinite(found[0].end)):
                found = read(name) or found
        if found:
            return found
    return []


def decode_text(data: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 or 32 with a byte-order mark."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} begins as {encoding.upper()} and goes on otherwise ({error.reason} "
                    f"at byte {error.start}); write it anew as UTF-8"
                ) from error
    if b"\0" in data:
        raise ValueError(
            f"{where} holds zero bytes, as UTF-16 without a byte-order mark does; "
            "convert it: iconv -f UTF-16LE -t UTF-8"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); if it is "
            "Windows-1252, Shift JIS, GBK or the like, convert it: iconv -f ENCODING -t UTF-8"
        ) from error
    return text


def parse_json(data: bytes, where: str) -> Any:
    """JSON in UTF-8, 16 or 32; a name twice in one object is refused."""
    try:
        return json.loads(data, object_pairs_hook=refuse_repeats)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply; rewrite it") from error
    except ValueError as error:
        raise ValueError(
            f"{where} cannot be read as JSON ({error}); repair or rewrite it"
        ) from error


# -- subtitles -------------------------------------------------------------------------------------


def from_srt(text: str, where: str) -> list[Caption]:
    """SubRip: a number, "00:00:01,000 --> 00:00:02,500", lines of text, an empty line."""
    lines = text.splitlines()
    captions: list[Caption] = []
    timed: tuple[float, float] | None = None
    said: list[str] = []
    for number, line in enumerate(lines, 1):
        if "-->" in line:
            if timed is not None:
                if said and said[-1].strip().isdecimal():
                    said.pop()  # the next caption's number
                captions.append(Caption(*timed, "\n".join(said)))
            timed, said = _span(line, f"{where} line {number}"), []
        elif timed is not None:
            said.append(line)
        elif line.strip() and not line.strip().isdecimal():
            raise ValueError(
                f"{where} line {number} is {line.strip()[:40]!r}; SubRip begins with a number and "
                "a line of times, 00:00:01,000 --> 00:00:02,500"
            )
    if timed is not None:
        captions.append(Caption(*timed, "\n".join(said)))
    return _clean(captions)


def from_vtt(text: str, where: str) -> list[Caption]:
    """WebVTT. A line that repeats the line shown before it, as in rolling captions, is left out."""
    blocks = re.split(r"\n[ \t]*(?:\n[ \t]*)+", text.replace("\r\n", "\n").replace("\r", "\n"))
    if not re.match(r"WEBVTT(?:[ \t\n]|$)", blocks[0]):
        first = blocks[0].partition("\n")[0][:40]
        raise ValueError(f"{where} line 1 is {first!r}; WebVTT begins with WEBVTT")
    captions = []
    shown = ""
    for block in blocks:
        lines = block.split("\n")
        place = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if place is None or re.match(r"NOTE\b", lines[0]):
            continue
        # the line's number costs a search, so it is found only for a message
        span = _span(lines[place], where, text)
        said = []
        for line in map(_plain, lines[place + 1 :]):
            if line and line != shown:
                said.append(line)
            shown = line or shown
        captions.append(Caption(*span, "\n".join(said)))
    return _clean(captions)


def _span(line: str, where: str, text: str | None = None) -> tuple[float, float]:
    if text is not None:
        # a function would be called for every cue
        number = text.count("\n", 0, text.find(line)) + 1
        where = f"{where} line {number}"
    begin, _, rest = line.partition("-->")
    words = rest.split()
    try:
        start, end = seconds_of(begin.strip()), seconds_of(words[0] if words else "")
    except ValueError:
        raise ValueError(
            f"{where} has the times {line.strip()[:60]!r}; "
            "they are written 00:00:01.000 --> 00:00:02.500"
        ) from None
    _check_span(start, end, where)
    return start, end


def seconds_of(time: str | float) -> float:
    """Seconds of a number or of "1:02:03.5". Raises ValueError for anything else."""
    if isinstance(time, bool):
        raise ValueError(f"{time} is no time")
    try:
        if isinstance(time, str) and (found := _TIME.fullmatch(time.strip())):
            hours, minutes, rest = found.groups()
            return int(hours or 0) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
        seconds = float(time)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{time!r:.40} is no time; give seconds, or hours:minutes:seconds")
    return seconds


def _check_span(start: float, end: float, where: str) -> None:
    if end < start:
        raise ValueError(f"{where} ends at {end:g} s, before its start at {start:g} s; correct it")


def _plain(text: str) -> str:
    """Without tags, entities and white space around."""
    return html.unescape(_TAG.sub("", text)).strip() if _has_markup(text) else text.strip()


def _has_markup(text: str) -> bool:
    return "<" in text or "&" in text or "{" in text


def _clean(captions: Sequence[Caption]) -> list[Caption]:
    """Composed, in one line each, without mark-up; captions without text are left out."""
    cleaned = []
    for one in captions:
        text = " ".join(_plain(one.text).split())
        if text:
            cleaned.append(Caption(one.start, one.end, composed(writable(text))))
    return cleaned


# -- tables ----------------------------------------------------------------------------------------


def from_table(text: str, where: str, separator: str = ",") -> list[Caption]:
    """Rows of start, end and text under a header, as HowTo100M's captions of one video."""
    captions = []
    for number, row in table_rows(text, where, separator):
        try:
            start, end, said = row["start"], row["end"], row["text"]
        except KeyError as error:
            raise ValueError(
                f"{where} has no column {error}; a table of captions has start, end and text"
            ) from None
        captions.append(timed_caption(start, end, said, f"{where} line {number}"))
    return _clean(captions)


def table_rows(text: str, where: str, separator: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: value}) of each row under a header. Raises ValueError for uneven rows."""
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len({*header}) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise ValueError(f"{where} has two columns {twice!r}; give each one name")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{where} line {reader.line_num} has {len(row)} values under {len(header)} "
                    "columns; quote texts that hold the separator"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{where} line {reader.line_num} is no row of a table ({error})"
        ) from error


def timed_caption(start: Any, end: Any, text: Any, where: str) -> Caption:
    try:
        begin, until = seconds_of(start), seconds_of(end)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _check_span(begin, until, where)
    if not isinstance(text, str):
        raise ValueError(f"{where} has text {text!r:.80}, a JSON {kind_of(text)}; give a string")
    return Caption(begin, until, text)


# -- JSON ------------------------------------------------------------------------------------------


def load_captions(path: str | os.PathLike) -> dict[str, tuple[Caption, ...]]:
    """Read ``{"clip.mp4": [{"start": 0.2, "end": 1.1, "text": "..."}, ...], ...}``.

    A file's captions may also be HowTo100M's lists, see ``from_entries``. Halves of surrogate
    pairs, as of an emoji cut in two, become U+FFFD, with a warning.

    Raises:
        ValueError: anything else, with file, caption, value, rule and remedy.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a JSON {kind_of(content)}; it must be an object of media names, each "
            "with its list of captions"
        )
    captions = {
        name: tuple(from_entries(entries, f"{path}: {name!r}")) for name, entries in content.items()
    }
    broken = [
        f"{name!r} caption {place}"
        for name, entries in content.items()
        for place, text in enumerate(_texts_of(entries))
        if not is_writable(text)
    ]
    if broken:
        warnings.warn(
            f"{path} has {len(broken)} texts with half of a surrogate pair, as of an emoji cut in "
            f"two, replaced by U+FFFD: {', '.join(broken[:5])}",
            stacklevel=2,
        )
    return captions


def from_lists(value: Mapping[str, Any], where: str) -> list[Caption]:
    """HowTo100M's {"start": [...], "end": [...], "text": [...]} of one video."""
    lists = [value.get(key) for key in ("start", "end", "text")]
    if not all(isinstance(each, list) for each in lists):
        raise ValueError(f"{where} has {sorted(value)}; it must have lists start, end and text")
    starts, ends, texts = lists
    assert starts is not None and ends is not None and texts is not None
    if not len(starts) == len(ends) == len(texts):
        raise ValueError(
            f"{where} has {len(starts)} starts, {len(ends)} ends and {len(texts)} texts; "
            "each caption has one of each"
        )
    return _clean(
        [
            timed_caption(*each, f"{where} caption {place}")
            for place, each in enumerate(zip(starts, ends, texts, strict=True))
        ]
    )


def from_entries(value: Any, where: str) -> list[Caption]:
    """Of one file: our list of {"start", "end", "text"}, or HowTo100M's lists."""
    if isinstance(value, Mapping):
        return from_lists(value, where)
    if not isinstance(value, list):
        raise ValueError(
            f"{where} has a JSON {kind_of(value)}; it must have a list of captions, "
            "which may be empty"
        )
    return _clean([caption_of(each, f"{where} caption {i}") for i, each in enumerate(value)])


def _texts_of(value: Any) -> list[str]:
    """The texts of what ``from_entries`` has taken."""
    return value["text"] if isinstance(value, Mapping) else [entry["text"] for entry in value]


def from_json(value: Any, where: str) -> list[Caption]:
    """Captions in the JSON of one example, as in a shard of webdataset or video2dataset.

    Timed ones come first: ``clip_subtitles``, ``subtitles`` (also within ``yt_meta_dict``),
    ``captions``, or lists start, end and text. Subtitles of a video that was cut into clips are in
    the whole video's times, which ``clips`` tells. Otherwise ``caption`` or ``text``, a string or a
    list of strings, belongs to the whole file. Other keys are left alone.
    """
    if isinstance(value, list):
        return from_entries(value, where)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} holds a JSON {kind_of(value)}; it must be an object or a list")
    if all(isinstance(value.get(key), list) for key in ("start", "end", "text")):
        return from_lists(value, where)
    youtube = value.get("yt_meta_dict") or {}
    youtube = youtube if isinstance(youtube, Mapping) else {}
    for holder, key in (
        (value, "clip_subtitles"),
        (value, "subtitles"),
        (youtube, "subtitles"),
        (value, "captions"),
    ):
        said = holder.get(key)
        if isinstance(said, Mapping):  # by language
            said = next(iter(said.values()), None)
        if isinstance(said, list) and said and isinstance(said[0], Mapping):
            return _subtitles(said, _origin(value.get("clips")), f"{where}: {key}")
    for key in ("caption", "captions", "text"):
        texts = value.get(key)
        texts = [texts] if isinstance(texts, str) else texts
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return _clean([Caption(0.0, math.inf, text) for text in texts])
    return []


def _origin(clips: Any) -> float:
    """When a clip began in the video it was cut from; 0 for a whole video."""
    try:
        ((start, _end),) = clips
        return seconds_of(start)
    except (TypeError, ValueError):
        return 0.0


def _subtitles(entries: Sequence[Any], origin: float, where: str) -> list[Caption]:
    captions = []
    for place, entry in enumerate(entries):
        at = f"{where} {place}"
        if not isinstance(entry, Mapping) or not {"start", "end"} <= entry.keys():
            raise ValueError(f"{at} has no start and end; each subtitle has both")
        lines = next((entry[key] for key in ("lines", "line", "text") if key in entry), None)
        if isinstance(lines, Mapping):  # by language
            lines = next(iter(lines.values()), "")
        text = "\n".join(map(str, lines)) if isinstance(lines, list) else lines
        caption = timed_caption(entry["start"], entry["end"], text, at)
        captions.append(Caption(caption.start - origin, caption.end - origin, caption.text))
    return _clean(captions)


def stream_entries(path: Path, chunk_bytes: int = 1 << 22) -> Iterator[tuple[str, Any]]:
    """(name, value) of a JSON object, one at a time, however large the file is.

    The whole file is never held: HowTo100M's has 136 million captions.

    Raises:
        ValueError: no JSON object, with the file and the byte near which it goes wrong.
    """
    decoder = json.JSONDecoder(object_pairs_hook=refuse_repeats)
    with open(path, "rb") as file:
        head = file.read(4)
        mark, encoding = next(
            ((mark, name) for mark, name in _BOMS if head.startswith(mark)),
            (b"", json.detect_encoding(head)),
        )
        file.seek(len(mark))
        text = codecs.getincrementaldecoder(encoding)()
        buffer, place, at_end = "", 0, False

        def fail(reason: str) -> ValueError:
            return ValueError(
                f"{path} cannot be read as JSON ({reason} before byte {file.tell()}); "
                "repair or rewrite it"
            )

        def more() -> bool:
            nonlocal buffer, place, at_end
            if at_end:
                return False
            data = file.read(max(chunk_bytes, len(buffer) - place))
            at_end = not data
            try:
                buffer = buffer[place:] + text.decode(data, final=at_end)
            except UnicodeDecodeError as error:
                raise fail(f"not {encoding.upper()}, {error.reason}") from error
            place = 0
            return True

        def skip_space() -> str:
            nonlocal place
            while True:
                while place < len(buffer) and buffer[place] in " \t\r\n":
                    place += 1
                if place < len(buffer):
                    return buffer[place]
                if not more():
                    return ""

        def value() -> Any:
            nonlocal place
            skip_space()
            while True:
                try:
                    found, end = decoder.raw_decode(buffer, place)
                except RecursionError as error:
                    raise fail("nested too deeply") from error
                except json.JSONDecodeError as error:
                    if not more():
                        raise fail(error.msg) from error
                    continue
                except ValueError as error:  # a name twice in one object
                    raise fail(str(error)) from error
                # a number at the end of what was read may go on
                if end == len(buffer) and not at_end and more():
                    continue
                place = end
                return found

        if skip_space() != "{":
            raise ValueError(
                f"{path} holds no JSON object; it must be an object of media names, each with its "
                "captions"
            )
        place += 1
        following = skip_space()
        while following != "}":
            name = value()
            if not isinstance(name, str):
                raise fail("a name that is no string")
            if skip_space() != ":":
                raise fail(f"no ':' after {name!r:.60}")
            place += 1
            yield name, value()
            following = skip_space()
            if following == ",":
                place += 1
                if skip_space() == "}":
                    raise fail("a comma before the end")
            elif following != "}":
                raise fail(f"no ',' after the captions of {name!r:.60}")
        place += 1
        if skip_space():
            raise fail("more after the object's end")
