"""Compiles the C++ extension: the recipe of setup.py, and of tests that want it with sanitizers or
with emulated bf16 instructions.

Every ``*.cpp`` below this folder is a part of it. One that begins with the line ``// levels: ...``
is compiled once for each instruction set named there, with flags and a namespace (VF_LEVEL) of its
own. Which one runs is chosen when the module is loaded (common/isa.cpp). ninja compiles in parallel
and only what changed.
"""

import contextlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
COMMON = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"]
BINDING = ["-O1"]  # half the time to compile; nothing runs long there
KERNEL = ["-fno-exceptions"]  # with them every object would carry a weak symbol

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
LEVELS = {  # name, which is also the namespace -> flags
    "base": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


class Source(NamedTuple):
    """A C++ file, and the instruction sets it is compiled for; None: once, for any machine."""

    file: Path
    levels: tuple[str, ...] | None

    @property
    def stem(self) -> str:
        """Its name in objects and macros: attention/forward.cpp is attention_forward."""
        return "_".join(self.file.relative_to(HERE).with_suffix("").parts)

    @property
    def objects(self) -> dict[str, str]:
        """Level ("" where there is but one) -> the object's file."""
        if self.levels is None:
            return {"": f"{self.stem}.o"}
        return {level: f"{self.stem}_{level}.o" for level in self.levels}


def sources() -> list[Source]:
    """The C++ files, with those of their levels that this kind of processor has.

    Raises:
        ValueError: a file names a level that LEVELS lacks.
    """
    found = []
    for file in sorted(HERE.rglob("*.cpp")):
        with file.open() as opened:
            _, named, levels = opened.readline().partition("// levels:")
        if unknown := [level for level in levels.split() if level not in LEVELS]:
            raise ValueError(
                f"{file} names the level {unknown[0]!r}; there are {', '.join(LEVELS)}"
            )
        here = tuple(level for level in levels.split() if X86 or level == "base")
        found.append(Source(file, here if named else None))
    return found


def interface() -> str:
    """The digest of the bindings, which the extension carries (kernels/native_interface.py)."""
    file = HERE.parent / "kernels" / "native_interface.py"
    spec = importlib.util.spec_from_file_location("native_interface", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(HERE / "bind")


def build(target: Path, folder: Path, *, emulated: bool = False, flags: Sequence[str] = ()) -> None:
    """Compile the extension to ``target``, objects to ``folder``.

    The compiler is CXX, else Python's own or c++; it needs OpenMP and C++20 (g++ 10, clang++ 10).

    Args:
        emulated: bf16 instructions and the matrix unit are written out in AVX-512
            (common/emulated.h), for tests on machines without them.
        flags: further ones for compiler and linker, e.g. ["-fsanitize=undefined"].

    Raises:
        RuntimeError: there is no compiler, or it failed; with what it said.
    """
    compiler, ninja = _compiler(), _ninja()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    files = {
        "build.ninja": _recipe(target.resolve(), compiler, emulated, flags),
        "levels.h": _levels(),
        "interface.h": f'#define VF_INTERFACE "{interface()}"\n',
    }
    with _alone(folder):
        for name, text in files.items():
            file = folder / name
            if not file.exists() or file.read_text() != text:  # what is newer is compiled again
                file.write_text(text)
        done = subprocess.run([ninja, "-k", "0", "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        # the first lines: the rest follows from them
        raise RuntimeError("\n".join(["compiling the extension failed:", *said[:60]]))


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]):
            return named
        raise RuntimeError(f"there is no C++ compiler {named[0]}, which CXX names")
    own = shlex.split(sysconfig.get_config_var("CXX") or "")
    for candidate in (own, ["c++"], ["g++"], ["clang++"]):
        # Python's own may have stayed where Python was built
        if candidate and shutil.which(candidate[0]):
            return candidate
    raise RuntimeError("there is no C++ compiler; install g++ or clang++, or name one in CXX")


def _ninja() -> str:
    """The ninja of this Python's environment, else the one on PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("compiling the extension needs ninja: pip install ninja") from None
        return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two installs from one checkout take turns."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _levels() -> str:
    """levels.h: for each source with levels a macro that repeats another for each of them."""
    lines = ["// made by compile_native.py of the sources' first lines", "#pragma once"]
    for source in sources():
        if source.levels is not None:
            repeats = " ".join(f"repeated({level})" for level in source.levels)
            lines.append(f"#define VF_LEVELS_{source.stem.upper()}(repeated) {repeats}")
    return "\n".join(lines) + "\n"


def _recipe(target: Path, compiler: list[str], emulated: bool, flags: Sequence[str]) -> str:
    import pybind11

    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    units = []
    for source in sources():
        for level, out in source.objects.items():
            if level:
                own = AVX512 if emulated and level.endswith("bf16") else LEVELS[level]
                more = [*KERNEL, *own, f"-DVF_LEVEL={level}"]
            else:
                more = [*BINDING, *headers]
            units.append((source.file, out, more))
    macros = [*(["-DVF_X86"] if X86 else []), *(["-DVF_EMULATED"] if emulated else [])]
    undefined = " -undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines = [
        f"cxx = {_quote(compiler)}",
        f"flags = {_quote([*COMMON, *macros, f'-I{HERE}', '-I.'])}",
        f"last = {_quote(flags)}",
        "rule compile",
        "  command = $cxx $flags $more $last -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $flags $last -shared $in -o $out{undefined}",
    ]
    for source, out, more in units:
        lines += [f"build {out}: compile {_escape(source)}", f"  more = {_quote(more)}"]
    lines += [
        f"build {_escape(target)}: link {' '.join(out for _, out, _ in units)}",
        f"default {_escape(target)}",
    ]
    return "\n".join(lines) + "\n"


def _quote(words: Sequence[str]) -> str:
    """For the shell, inside a variable of ninja's."""
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    """As a path of ninja's, which quotes it for the shell itself."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
