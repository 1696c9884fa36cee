"""Tar shards, as webdataset and video2dataset write them, read without unpacking.

Members of one key lie together: ``000012345.mp4``, ``.txt``, ``.json``. A key's media are examples:
its videos; where it has none, its sounds; where it has neither, its pictures. The captions are
those of members with the media's whole name, else with the key.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from .captions import SIDECARS, Sidecars, chosen, key_of, parse_json, read_sidecar
from .columns import AUDIO, PartBuilder
from .media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES, MediaError
from .probe import measure
from .remote import open_bytes, size_and_time
from .source import Place
from .text import Caption

_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)
# larger texts are no captions
_MOST_TEXT_BYTES = 1 << 26
# FFmpeg reads headers before anything else, so more read-ahead than this is thrown away
_SEARCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass
class Shard:
    """The files in a tar, in order, and what could not be read of it."""

    members: list[Member] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def list_members(file: IO[bytes], size: int, label: str) -> Shard:
    """The regular files in a plain tar of ``size`` bytes; GNU's and pax's long names too.

    Where the tar was cut short, the members before the cut are used. After a damaged header the
    next sound one is looked for.

    Raises:
        ValueError: the tar is compressed, or no tar.
    """
    head = file.read(8)
    for mark, name, command in _COMPRESSED:
        if head.startswith(mark):
            raise ValueError(
                f"{label} is compressed ({name}), so its members cannot be read at random: "
                f"{command} it; media are compressed already"
            )
    shard = Shard()
    start: int | None = 0
    while start is not None:
        start = _list_from(file, start, size, label, shard)
    return shard


def _list_from(file: IO[bytes], start: int, size: int, label: str, shard: Shard) -> int | None:
    """List members from a header at ``start`` on. Returns where to go on after a damaged one."""
    file.seek(start)
    try:
        # closing it would not close the file
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except tarfile.ReadError as error:
        if start:
            return None
        if size == 0:
            raise ValueError(f"{label} is empty; write it again or remove it") from error
        raise ValueError(f"{label} is no tar ({error}); name tar shards, or remove it") from error
    end = start
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError, OSError, UnicodeError, OverflowError):
            member = None
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
        if member is None:
            break
        end = tar.offset  # where the next header is due
        if member.issym() or member.islnk():
            shard.problems[member.name] = f"a link to {member.linkname}; only files are read"
        elif member.sparse is not None:
            shard.problems[member.name] = "a sparse file, whose bytes are not all there"
        elif member.offset_data + member.size > size and member.isreg():
            shard.problems[member.name] = (
                f"{label} was cut short within it: {max(size - member.offset_data, 0)} of "
                f"{member.size} bytes are there"
            )
            return None
        elif member.isreg():
            shard.members.append(Member(member.name, member.offset_data, member.size))
    file.seek(end)
    rest = file.read(_BLOCK)
    if rest == bytes(_BLOCK):
        return None
    if len(rest) < _BLOCK:
        shard.problems[""] = (
            f"{label} ends after {size} bytes without the mark of its end, so it was cut short "
            "or is still being written; what is whole in it is used"
        )
        return None
    found = _next_header(file, end + _BLOCK)
    left_out = (size if found is None else found) - end
    shard.problems[f"byte {end}"] = (
        f"no header of a member where one is due in {label}; {left_out} bytes are left out"
    )
    return found


def _next_header(file: IO[bytes], start: int) -> int | None:
    """The next place where a sound header may be; None where there is none."""
    file.seek(start)
    place = start
    while data := file.read(_SEARCH_BYTES):
        for at in range(0, len(data) - _BLOCK + 1, _BLOCK):
            block = data[at : at + _BLOCK]
            if block[257:262] == b"ustar" and _has_sound_sum(block):
                return place + at
        place += len(data)
    return None


def _has_sound_sum(block: bytes) -> bool:
    try:
        stored = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return stored == sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


def groups(members: Sequence[Member]) -> Iterator[tuple[str, list[Member]]]:
    """(key, its members), as they lie one behind the other."""
    key, together = "", list[Member]()
    for member in members:
        base = os.path.basename(member.name)
        if base.startswith("."):  # "._talk.mp4" of macOS, and webdataset's own ".__"
            continue
        if (its := key_of(member.name)) != key:
            if together:
                yield key, together
            key, together = its, []
        together.append(member)
    if together:
        yield key, together


def read_shard(path: str, label: str, stored_path: str, builder: PartBuilder) -> None:
    """Add a shard's examples to a part as one block.

    Args:
        label: how names of its members begin. stored_path: its path relative to the source's root.

    Raises:
        ValueError: no plain tar. OSError: it cannot be read.
    """
    size, changed = size_and_time(path)
    taken: set[str] = set()
    lost_sounds = 0
    with open_bytes(path) as file:
        shard = list_members(file, size, label)
        for name, reason in shard.problems.items():
            builder.problems[f"{label}/{name}" if name else label] = reason
        for key, together in groups(shard.members):
            media = _media_of(together)
            texts = _Texts(file, together, label, builder)
            if not media:
                if reason := texts.why_without_media():
                    builder.problems[f"{label}/{key}"] = reason
                continue
            for member in media:
                name = f"{label}/{member.name}"
                if member.name in taken:
                    builder.problems[f"{name} at {member.offset}"] = "its name is taken"
                    continue
                taken.add(member.name)
                if not member.size:
                    builder.problems[name] = f"{name} is empty"
                    continue
                try:
                    known = measure(Place(path, name, member.offset, member.size))
                except MediaError as error:
                    builder.problems[name] = str(error)
                    continue
                if not known.streams & AUDIO:
                    lost_sounds += _has(together, AUDIO_SUFFIXES)
                builder.add(
                    name,
                    stored_path,
                    file_bytes=size,
                    file_time=changed,
                    offset=member.offset,
                    size=member.size,
                    measured=known,
                    captions=texts.captions_of(member.name),
                )
    if lost_sounds:
        builder.problems[f"{label} sounds"] = (
            f"{lost_sounds} videos without sound have it in a member of its own, which is not "
            "read; write it into the video"
        )
    builder.end_block()


def _has(members: Sequence[Member], suffixes: tuple[str, ...]) -> bool:
    return any(member.name.lower().endswith(suffixes) for member in members)


def _media_of(members: Sequence[Member]) -> list[Member]:
    for suffixes in (VIDEO_SUFFIXES, AUDIO_SUFFIXES, IMAGE_SUFFIXES):
        if found := [each for each in members if each.name.lower().endswith(suffixes)]:
            return found
    return []


class _Texts:
    """The members of a key that may hold captions."""

    def __init__(
        self, file: IO[bytes], members: Sequence[Member], label: str, builder: PartBuilder
    ) -> None:
        self.file, self.label, self.builder = file, label, builder
        self.members = {
            each.name: each
            for each in members
            if each.name.lower().endswith(SIDECARS) and each.size <= _MOST_TEXT_BYTES
        }
        self.sidecars = Sidecars(self.members)
        self.unused = [
            each.name
            for each in members
            if not each.name.lower().endswith((*SIDECARS, *MEDIA_SUFFIXES))
        ]

    def captions_of(self, name: str) -> list[Caption]:
        return chosen(self.sidecars.of(name), self._captions_in)

    def _captions_in(self, name: str) -> list[Caption]:
        where = f"{self.label}/{name}"
        try:
            return read_sidecar(name, self._read(self.members[name]), where)
        except ValueError as error:
            self.builder.problems[where] = str(error)
            return []

    def why_without_media(self) -> str:
        """The reason that video2dataset notes in the .json; "" for what is no clip at all."""
        for name, member in self.members.items():
            if name.lower().endswith(".json"):
                try:
                    note = parse_json(self._read(member), member.name)
                except ValueError as error:
                    return f"has no media ({error})"
                if isinstance(note, dict) and note.get("status"):
                    told = " ".join(str(note.get("error_message") or "").split())[:200]
                    return f"has no media ({note['status']}{': ' if told else ''}{told})"
        names = [each.name for each in self.members.values()] or self.unused
        return f"has no media, only {', '.join(names[:3])}" if names else ""

    def _read(self, member: Member) -> bytes:
        self.file.seek(member.offset)
        return self.file.read(member.size)


_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """ "{00..02}.tar" and "{a,b}.tar" as the shell expands them; numbers keep their zeros.

    Raises:
        ValueError: braces that hold neither a range nor a list.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"{pattern} counts down from {first} to {last}; swap them")
        digits = max(len(span[1]), len(span[2])) if "0" in (span[1][0], span[2][0]) else 0
        values = [f"{number:0{digits}d}" for number in range(first, last + 1)]
    elif "," in inside:
        values = inside.split(",")
    else:
        raise ValueError(
            f"{pattern} has braces around {inside!r}; they hold a range, {{000..099}}, or a list"
        )
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [each for value in values for each in expand_braces(f"{head}{value}{tail}")]
