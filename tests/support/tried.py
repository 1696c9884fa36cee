"""Inputs on which reading could go wrong, and what happens then: the tests say it, docs show it.

``python tests/support/tried.py`` writes the table of docs/testing.md anew.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- tried: written by tests/support/tried.py -->", "<!-- end of tried -->"
MODULES = (
    "data/test_media_matrix.py",
    "data/test_media_kinds.py",
    "data/test_pictures.py",
    "data/test_captions_kinds.py",
    "data/test_folder_kinds.py",
    "data/test_fuzz.py",
    "evaluation/test_encode_kinds.py",
    "evaluation/test_embed.py",
)


def tried(kind, what, outcome):
    """Mark a test with a row of the table; the test is what makes it true."""

    def mark(test):
        test.tried = (kind, what, outcome)
        return test

    return mark


def rows():
    """(kind, what, outcome) of every marked test, by kind, in the order of the files."""
    found = []
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "tests" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [value.tried for value in vars(module).values() if hasattr(value, "tried")]
    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    return [row for kind in kinds for row in found if row[0] == kind]


def table():
    lines = ["| kind | inputs tried | outcome |", "|---|---|---|"]
    before = None
    for kind, what, outcome in rows():
        lines.append(f"| {'' if kind == before else kind} | {what} | {outcome} |")
        before = kind
    return "\n".join(lines)


def parts(page):
    """The page before the table, the table, and what follows."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    before, _, after = parts(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
