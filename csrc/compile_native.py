"""Compiles the C++ extension: the recipe of setup.py, and of tests that want it with sanitizers or with emulated bf16 instructions.

Every op is one source, compiled once for each instruction set it has a use for, with flags and a namespace of its own; what runs is chosen
when the module is loaded (isa.cpp). ninja compiles in parallel and only what changed.
"""

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"]
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
# op -> the instruction sets it is compiled for; a machine uses the highest that it has
OPS = {
    "patch_embed.cpp": ("base", "avx2", "avx512"),
    "contrastive_lse.cpp": ("base", "avx2", "avx512", "avx512_bf16", "amx_bf16"),
    "attention.cpp": ("avx512_bf16", "amx_bf16"),
    "short_attention.cpp": ("avx2", "avx512"),
    "drop_token.cpp": ("base",),  # it copies
}
SHARED = (
    "binding.cpp",
    "bind_attention.cpp",
    "bind_drop_token.cpp",
    "bind_contrastive_lse.cpp",
    "bind_patch_embed.cpp",
    "isa.cpp",
)  # for any machine


def build(target: Path, folder: Path, *, emulated: bool = False, flags: Sequence[str] = ()) -> None:
    """Compile the extension to ``target``, objects to ``folder``. The compiler is CXX, else Python's own or c++; it needs OpenMP.

    Args:
        emulated: bf16 instructions and the matrix unit are written out in AVX-512 (emulated.h), for tests on machines without them.
        flags: further ones for compiler and linker, e.g. ["-fsanitize=undefined"].

    Raises:
        RuntimeError: there is no compiler, or it failed; with what it said.
    """
    compiler, ninja = _compiler(), _ninja()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    text = _recipe(target.resolve(), compiler, emulated, flags)
    with _alone(folder):
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run(
            [ninja, "-C", str(folder), "-f", file.name], capture_output=True, text=True
        )
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        raise RuntimeError(
            "\n".join(["compiling the extension failed:", *said[:60]])
        )  # the rest follows from the first


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]):
            return named
        raise RuntimeError(f"there is no C++ compiler {named[0]}, which CXX names")
    for candidate in (
        shlex.split(sysconfig.get_config_var("CXX") or ""),
        ["c++"],
        ["g++"],
        ["clang++"],
    ):
        if candidate and shutil.which(
            candidate[0]
        ):  # Python's own may have stayed where Python was built
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


def _recipe(target: Path, compiler: list[str], emulated: bool, flags: Sequence[str]) -> str:
    import pybind11

    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    units = [(source, f"{Path(source).stem}.o", [*BINDING, *headers]) for source in SHARED]
    for source, levels in OPS.items():
        for level in levels if X86 else [each for each in levels if each == "base"]:
            own = AVX512 if emulated and level.endswith("bf16") else LEVELS[level]
            units.append(
                (source, f"{Path(source).stem}_{level}.o", [*KERNEL, *own, f"-DVF_LEVEL={level}"])
            )
    macros = [*(["-DVF_X86"] if X86 else []), *(["-DVF_EMULATED"] if emulated else [])]
    undefined = " -undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines = [
        f"cxx = {_quote(compiler)}",
        f"flags = {_quote([*COMMON, *macros, f'-I{HERE}'])}",
        f"last = {_quote(flags)}",
        "rule compile",
        "  command = $cxx $flags $more $last -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $flags $last -shared $in -o $out{undefined}",
    ]
    for source, out, more in units:
        lines += [f"build {out}: compile {_escape(HERE / source)}", f"  more = {_quote(more)}"]
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
