"""The digest that says whether an extension and these Python files belong together.

csrc/compile_native.py compiles the digest of csrc/bind into the extension. ``expected`` is what
kernels/native.py compares with it: computed from the same folder in a checkout, so that an editable
install whose sources have moved on is noticed; read from a file that the build wrote elsewhere.
"""

import hashlib
import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_BINDINGS = _HERE.parent / "csrc" / "bind"  # in a checkout, or an unpacked source distribution
WRITTEN = "native_interface.txt"  # beside an installed extension

# what does not count: comments and white space outside of strings, and a string's division in two
_STRING_OR_NOT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/|\s+', re.DOTALL)


def digest(bindings: Path = _BINDINGS) -> str:
    """Digest of the files of bindings: of what the extension takes and offers."""
    text = hashlib.sha256()
    for file in sorted([*bindings.glob("*.cpp"), *bindings.glob("*.h")]):
        code = _STRING_OR_NOT.sub(lambda found: found[1] or "", file.read_text())
        text.update(f"{file.name}\n".encode() + code.replace('""', "").encode() + b"\n")
    return text.hexdigest()[:16]


def expected() -> str:
    """Digest of the bindings that these Python files call; "" where nothing tells."""
    if _BINDINGS.is_dir():
        return digest()
    written = _HERE / WRITTEN
    return written.read_text() if written.exists() else ""
