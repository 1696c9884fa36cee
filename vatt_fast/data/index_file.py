"""An index's index.json: what the index was made of, and what of that has changed since.

Paths in it are relative to the index where the data lie around it: both may be moved together.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .columns import Strings, map_files
from .listing import INDEX_FILE, Listing, Wanted, caption_files
from .remote import is_url, join_path, size_and_time
from .source import Identity

FORMAT, VERSION = "vatt_fast index", 1
OTHER_FILES = "has other files"
# of single files more than this are not all looked at when an index is opened, but every so many
_MOST_CHECKED = 20_000


def is_index(folder: str | os.PathLike) -> bool:
    return (Path(folder) / INDEX_FILE).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """What index.json says. Raises ValueError for no index, a later version's, or a damaged one."""
    path = folder / INDEX_FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError("it is of something else")
        if about["version"] != VERSION:
            raise ValueError(f"it is of version {about['version']}, this program reads {VERSION}")
        Identity(**about["identity"])
        return about
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no index; make one with vatt-fast index SOURCE") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no index ({error}); delete {folder} and index again"
        ) from error


def asked_of(folder: Path) -> dict[str, str | None]:
    """The ``captions`` and ``media`` of the source that an index was made of."""
    asked = read_about(folder)["asked"]
    return {name: asked.get(name) for name in ("captions", "media")}


def wanted_of(folder: Path) -> Wanted | None:
    """The source that an index was made of, where both may have moved; None: it does not say."""
    about = read_about(folder)
    if not (text := about.get("text")):
        return None
    if not is_url(text):
        text = os.path.normpath(os.path.join(unportable(about["root"], folder), text))
    asked = asked_of(folder)
    return Wanted(text, captions=asked["captions"], media=asked["media"])


def holds_shards(folder: Path) -> bool:
    return any(kind == "shard" for kind, *_ in read_about(folder)["stamps"])


def changes(folder: Path, listing_shards: Sequence[str] | None = None) -> list[str]:
    """What has changed since an index was written, each by name; empty where nothing has.

    Shards, manifests, captions files and folders are all looked at, and of single media files,
    as of the files in a folder of captions, 20,000 at most.

    Args:
        listing_shards: the shards that are there now, relative to the root; None: not asked.
    """
    about = read_about(folder)
    root = unportable(about["root"], folder)
    told = []
    for kind, path, size, time in about["stamps"]:
        full = join_path(root, path) if kind == "shard" else unportable(path, folder)
        if reason := _differs(full, size, time, kind):
            told.append(f"{path} {reason}")
    if listing_shards is not None:
        known = {path for kind, path, *_ in about["stamps"] if kind == "shard"}
        told += [f"{path} is new" for path in listing_shards if path not in known]
        told += [f"{path} is no longer named" for path in sorted(known.difference(listing_shards))]
    if not any(kind == "shard" for kind, *_ in about["stamps"]):
        columns = map_files(folder / about["columns"])
        paths = Strings.of(columns, "path")
        step = -(-len(paths) // _MOST_CHECKED) if len(paths) else 1
        for row in range(0, len(paths), step):
            size, time = int(columns["file_bytes"][row]), int(columns["file_time"][row])
            if reason := _differs(join_path(root, paths[row]), size, time, "file"):
                told.append(f"{paths[row]} {reason}")
    return told


def _differs(path: str, size: int, time: int, kind: str) -> str:
    try:
        now, changed = stamp_of_captions(path) if kind == "captions" else size_and_time(path)
    except OSError:
        return "is gone"
    if kind == "folder":
        return "" if changed == time else OTHER_FILES
    if kind == "captions":
        return "" if (now, changed) == (size, time) else "has other captions"
    if now != size:
        return f"had {size} bytes and has {now}"
    return "" if changed == time else "was written anew"


def is_same_listing(folder: Path, listing: Listing) -> bool:
    """Whether an index lists just these files and captions; then their folders' times are noted.

    A folder's time changes with every file in it, of whatever kind.
    """
    about = read_about(folder)
    if about.get("listing") != digest_of_listing(listing):
        return False
    write_text(folder / INDEX_FILE, json.dumps(about | {"stamps": stamps_of(listing)}, indent=1))
    return True


def digest_of_listing(listing: Listing) -> str:
    """Of the files that are listed, and of where their captions are and what is known of them."""
    apart = None if listing.captions is None else os.path.abspath(listing.captions)
    digest = hashlib.sha256(f"{apart}\0{listing.asked}\n".encode(errors="surrogateescape"))
    for row in listing.rows:
        beside = [
            (path, size_and_time_or_none(join_path(listing.root, path)))
            for path in itertools.chain(*row.sidecars)
        ]
        digest.update(
            f"{row.name}\0{row.path}\0{row.segment}\0{beside}\0{row.captions}\n".encode(
                errors="surrogateescape"
            )
        )
    for shard in listing.shards:
        digest.update(f"{shard}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def stamps_of(listing: Listing) -> list[tuple[str, str, int, int]]:
    """(kind, path, bytes, time) of what is looked at again when the index is opened."""
    stamps = []
    for path in listing.stamped:
        size, time = size_and_time(path)
        kind = "folder" if os.path.isdir(path) else "file"
        # an index may move together with its data
        stamps.append((kind, os.path.abspath(path), size, time))
    if listing.captions is not None and listing.captions.is_dir():
        path = os.path.abspath(listing.captions)
        stamps.append(("captions", path, *stamp_of_captions(path)))
    for shard in listing.shards:
        try:
            stamps.append(("shard", shard, *size_and_time(join_path(listing.root, shard))))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ValueError(
                f"{join_path(listing.root, shard)} cannot be read ({reason}); "
                "name shards that are there"
            ) from error
    return stamps


def stamp_of_captions(path: str) -> tuple[int, int]:
    """Bytes and time of a file of captions; of a folder, bytes and a number for all its files."""
    if not os.path.isdir(path):
        return size_and_time(path)
    names = caption_files(Path(path))
    digest, total = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")), 0
    for name in names[:: -(-len(names) // _MOST_CHECKED) or 1]:
        size, time = size_and_time(os.path.join(path, name))
        digest.update(f"{size} {time}\n".encode())
        total += size
    return total, int.from_bytes(digest.digest()[:7])


def size_and_time_or_none(path: str) -> tuple[int, int] | None:
    try:
        return size_and_time(path)
    except OSError:
        return None


def portable(root: str, folder: Path) -> str:
    """A root that the index lies in, relative to the index: both may be moved together."""
    if is_url(root):
        return root
    root = os.path.abspath(root)
    within = os.path.relpath(folder.absolute(), root)
    return root if within.startswith("..") else os.path.relpath(root, folder.absolute())


def portable_text(text: str, root: str) -> str:
    """What a source is called, relative to its root."""
    return text if not text or is_url(text) else os.path.relpath(text, root or ".")


def unportable(root: str, folder: Path) -> str:
    if is_url(root) or os.path.isabs(root):
        return root
    return os.path.normpath(folder / root)
