"""A long work in parts, each whole or absent: killed, it goes on behind the last one."""

import json
import shutil
from pathlib import Path

import numpy as np

from ..files import replacing, write_text

_PLAN = "plan.json"


def begin(parts: Path, plan: str) -> bool:
    """Make the folder of parts, anew where it belongs to another plan; True where work is there."""
    try:
        same = (parts / _PLAN).read_text() == plan
    except FileNotFoundError:
        same = False
    if not same:
        if parts.exists():
            shutil.rmtree(parts)
        parts.mkdir()
        write_text(parts / _PLAN, plan)
    return bool(written(parts))


def part_path(parts: Path, number: int) -> Path:
    return parts / f"{number:08d}.npz"


def written(parts: Path) -> list[Path]:
    """The parts written."""
    return sorted(parts.glob("[0-9]" * 8 + ".npz"))


def write_part(
    parts: Path, number: int, found: dict[str, np.ndarray], files: list[str], skipped: dict
) -> None:
    said = json.dumps({"files": files, "skipped": skipped})
    with replacing(part_path(parts, number)) as part:
        np.savez(part, allow_pickle=False, said=np.array(said), **found)


def read_part(path: Path) -> tuple[dict[str, np.ndarray], list[str], dict[str, str]]:
    """What ``write_part`` wrote."""
    with np.load(path) as part:
        said = json.loads(str(part["said"]))
        found = {name: part[name] for name in part.files if name != "said"}
    return found, said["files"], said["skipped"]


def spans(numbers: list[int]) -> list[tuple[int, int]]:
    """Runs of numbers one after the other: (first, last + 1)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
