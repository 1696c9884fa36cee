"""How the verbs print what they found."""

from collections.abc import Iterable
from json import dumps
from typing import Any


def print_report(values: dict[str, Any], as_json: bool) -> None:
    """Print one value a line, or JSON."""
    if as_json:
        print(dumps(values))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key}: {inner}")
        else:
            print(f"{name}: {value}")


def unreadable(files: Iterable[str]) -> str:
    """How many files were skipped and the first of them, to end a sentence with."""
    names = list(files)
    listed = ", ".join(names[:5])
    return f"; skipped {len(names)} unreadable: {listed}" if names else ""
