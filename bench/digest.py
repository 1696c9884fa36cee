"""What a result line depends on, as a digest of the sources that ran.

A line is stale once the digest of today's sources is another. The digest ignores what cannot change
a time: comments, docstrings, formatting, imports, and the file that a definition stands in. A
Python file counts as its top-level statements, a C++ file as its tokens. Which files belong to a
line follows from the imports and includes themselves, beginning at the backend that ran. For "auto"
all backends of an op's rows in PREFERENCE count, but not the rows' conditions: a row that now holds
for other sizes leaves lines fresh whose backend is no longer the one that ran.
"""

import ast
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from vatt_fast.kernels import backends

ROOT = Path(__file__).resolve().parent.parent
_STEP = ("vatt_fast/model.py", "vatt_fast/losses.py")
_BUILD = ("setup.py", "csrc/compile_native.py")
# imported, but not run in what is timed: the cases, the tests' rule, other frameworks
_APART = re.compile(
    r"cases|ops|flops|parity|backends|native_interface|encoding|weights|text"
    r"|\w*jax\w*|xla|pallas\w*|__main__"
)


@functools.cache
def of(op: str, backend: str, ours: bool, best_peer: str | None, dtype: str, cuda: bool) -> str:
    """Digest of a result line's sources. ``op`` may be "step"; a ``best_peer`` counts as well."""
    units: set[str] = set()
    for path in files(op, backend, ours, best_peer, dtype, cuda):
        units.update(_python(path) if path.suffix == ".py" else _other(path))
    return hashlib.sha256("\n".join(sorted(units)).encode()).hexdigest()[:12]


def files(
    op: str, backend: str, ours: bool, best_peer: str | None, dtype: str, cuda: bool
) -> set[Path]:
    """The files that a line's contender and its best peer run."""
    ops = list(backends.BACKENDS) if op == "step" else [op]
    found: set[Path] = set()
    if ours:
        backend = backend.partition(" ")[0]  # tiles may follow
        name = backend.partition("_compiled")[0] if op == "step" else backend
        name = name.partition("_max-autotune")[0]
        for each in ops:
            found |= _op_files(each, name, dtype, cuda)
    if best_peer or not ours:
        found |= {ROOT / "bench" / name for name in ("peers.py", "towers.py")}
        found |= {ROOT / "kernels" / each / "plain.py" for each in ops}
    if op == "step":
        found |= _closure([ROOT / each for each in _STEP], "vatt_fast")
    return {path for path in found if path.exists()}


def _op_files(op: str, backend: str, dtype: str, cuda: bool) -> set[Path]:
    """An op's face, the backend that was named, or those that dispatch chooses among, and C++."""
    rows = backends.PREFERENCE["torch", "cuda" if cuda else "cpu"]
    chosen = {row.backend for row in rows if row.op == op} if backend == "auto" else {backend}
    folder = ROOT / "kernels" / op
    found = _closure([folder / f"{name}.py" for name in ("__init__", "op", *chosen)], "kernels")
    if cuda:
        return found | set((ROOT / "kernels" / "tiles").glob("*.json"))
    if any(name.startswith("native") for name in chosen):
        found |= cpp_files(op, dtype) | {ROOT / each for each in _BUILD}
    return found


# -- Python -----------------------------------------------------------------------------------


def _closure(roots: Iterable[Path], top: str) -> set[Path]:
    """The files below a top folder that these import when they are loaded, and they themselves."""
    found: set[Path] = set()
    left = [path for path in roots if path.exists()]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [
                each
                for each in _imported(path)
                if each.relative_to(ROOT).parts[0] == top
                and not _APART.fullmatch(each.stem)
                and each != ROOT / "kernels" / "__init__.py"
            ]
    return found


def _imported(path: Path) -> Iterator[Path]:
    here = _dotted(path)
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                if target := _file((*base, alias.name)) or _file(base):
                    yield target


def _dotted(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("vatt_fast", *parts) if parts[0] == "kernels" else parts


def _file(dotted: tuple[str, ...]) -> Path | None:
    parts = dotted[1:] if dotted[:2] == ("vatt_fast", "kernels") else dotted
    if not parts or parts[0] not in ("vatt_fast", "kernels"):
        return None
    stem = ROOT.joinpath(*parts)
    return next(
        (each for each in (stem.with_suffix(".py"), stem / "__init__.py") if each.exists()), None
    )


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _python(path: Path) -> tuple[str, ...]:
    return python_units(path.read_text())


def python_units(source: str) -> tuple[str, ...]:
    """The top-level statements of a module as dumps, without imports and docstrings."""
    tree = ast.parse(source)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    kept = (node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom))
    return tuple(ast.dump(node) for node in kept)


# -- C++ --------------------------------------------------------------------------------------


def cpp_files(op: str, dtype: str) -> set[Path]:
    """Sources that the op's kernels of a dtype are compiled from, and the headers they include.

    Attention's fp32 kernels are the short ones, its bf16 kernels all others. Of other ops both
    dtypes share a file; there headers of bf16 alone are left out for fp32.
    """
    csrc = ROOT / "csrc"
    own = [
        path
        for path in csrc.rglob("*.cpp")
        if op in path.relative_to(csrc).as_posix()
        and ("bind" in path.as_posix() or op != "attention" or _short(path) == (dtype == "fp32"))
    ]
    found: set[Path] = set()
    while own:
        path = own.pop()
        if path in found or "emulated" in path.name or (dtype == "fp32" and "bf16" in path.name):
            continue
        found.add(path)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        places = (path.parent, csrc, csrc / "common")
        own += [
            (place / name).resolve()
            for name in names
            for place in places
            if (place / name).exists()
        ]
    return found


def _short(path: Path) -> bool:
    return "short" in path.name


@functools.cache
def _other(path: Path) -> tuple[str, ...]:
    text = path.read_text()
    return (text,) if path.suffix == ".json" else (cpp_unit(text),)


_CPP_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<include>\#\s*include[^\n]*)|\\\n|\s+"""
    r"""|(?P<token>\d[\w.']*|[A-Za-z_]\w*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|.)""",
    re.DOTALL,
)


def cpp_unit(source: str) -> str:
    """The tokens of a C++ file, without comments, includes and white space."""
    found = (match["token"] for match in _CPP_TOKEN.finditer(source))
    return " ".join(token for token in found if token)
