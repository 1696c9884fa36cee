"""What a result line depends on, as a digest of the sources that ran.

A line is stale once the digest of today's sources is another. The digest ignores what cannot change
a time: comments, docstrings, formatting, imports, and the file that a definition stands in. A
Python file counts as its top-level statements, a C++ file as its tokens. Which files belong to a
line follows from the imports and includes themselves, beginning at the backend that ran; of
``peers.py`` the peer's row and the definitions that it names count. For "auto" all backends of an
op's rows in PREFERENCE count, but not the rows' conditions: a row that now holds for other sizes
leaves lines fresh whose backend is no longer the one that ran.
"""

import ast
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
        units.update(_units(path))
    if peer := best_peer if ours else backend:
        units.update(_peer_units(op, peer))
    return hashlib.sha256("\n".join(sorted(units)).encode()).hexdigest()[:12]


@functools.cache
def _units(path: Path) -> tuple[str, ...]:
    """A file's statements; of C++ its tokens, of a table its text."""
    text = path.read_text()
    if path.suffix == ".py":
        return python_units(text)
    return (text if path.suffix == ".json" else cpp_unit(text),)


def files(
    op: str, backend: str, ours: bool, best_peer: str | None, dtype: str, cuda: bool
) -> set[Path]:
    """The files that a line's contender and its best peer run."""
    ops = list(backends.BACKENDS) if op == "step" else [op]
    found: set[Path] = set()
    if ours:
        name = re.split("_compiled|_max-autotune| ", backend)[0]  # tiles may follow the backend
        for each in ops:
            found |= _op_files(each, name, dtype, cuda)
    if best_peer or not ours:
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


@functools.cache
def _imported(path: Path) -> list[Path]:
    """Files of ours that a module imports at its top level."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if base[:2] == ("vatt_fast", "kernels"):  # as kernels/ is installed
                base = base[1:]
            for alias in node.names:
                stems = (ROOT.joinpath(*base, alias.name), ROOT.joinpath(*base))
                files = ((stem.with_suffix(".py"), stem / "__init__.py") for stem in stems)
                found += [file for file in itertools.chain(*files) if file.exists()][:1]
    return found


def python_units(source: str) -> tuple[str, ...]:
    """The top-level statements of a module as dumps, without imports and docstrings."""
    return tuple(ast.dump(node) for node in _statements(source))


def _statements(source: str) -> list[ast.stmt]:
    tree = ast.parse(source)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]


@functools.cache
def _peer_units(op: str, name: str) -> set[str]:
    """A peer's row in PEERS, and what that names, and what those name; none of a step's plain."""
    defined: dict[str, Any] = {}
    for node in _statements((ROOT / "bench" / "peers.py").read_text()):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
            defined[ast.unparse(target)] = node
    left = [row for table in _values(defined["PEERS"].value, op) for row in _values(table, name)]
    found: set[str] = set()
    while left:
        node = left.pop()
        if (unit := ast.dump(node)) not in found:
            found.add(unit)
            names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            left += [defined[each] for each in names & defined.keys()]
    return found


def _values(table: Any, key: str) -> list[Any]:
    """What a dictionary of literals holds under a key."""
    pairs = zip(table.keys, table.values, strict=True)
    return [value for each, value in pairs if each.value == key]


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
        and (
            "bind" in path.as_posix()
            or op != "attention"
            or ("short" in path.name) == (dtype == "fp32")
        )
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


_CPP_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<include>\#\s*include[^\n]*)|\\\n|\s+"""
    r"""|(?P<token>\d[\w.']*|[A-Za-z_]\w*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|.)""",
    re.DOTALL,
)


def cpp_unit(source: str) -> str:
    """The tokens of a C++ file, without comments, includes and white space."""
    found = (match["token"] for match in _CPP_TOKEN.finditer(source))
    return " ".join(token for token in found if token)
