"""The C++ extension as a whole: how it is built and packed, what it chooses, and the battery on every instruction set."""

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import native_fixtures
import pytest
import torch
from native_fixtures import LEVELS, held_to, using
from op_battery import DTYPES, PARITY, judged

from vatt_fast.kernels import dispatch, native
from vatt_fast.kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
OPS = tuple(op for op, names in BACKENDS.items() if "native_cpu" in names)

built = pytest.mark.skipif(native.extension is None, reason=f"the extension is {native.explain()}")


def python(code: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, perhaps below another command."""
    line = [*command, sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        line, capture_output=True, text=True, env=os.environ | environment, timeout=600
    )


# -- the choice --------------------------------------------------------------------------------------------------------


@built
def test_the_environment_holds_the_kernels_to_a_lower_instruction_set():
    show = "from vatt_fast.kernels import native; print(native.level(), '|', native.explain())"
    level, explained = python(show, VATT_FAST_ISA="base").stdout.strip().split(" | ")
    assert level == "base"
    if native.extension.available() != "base":
        assert "VATT_FAST_ISA" in explained and native.extension.available() in explained
    wrong = python(show, VATT_FAST_ISA="sse9")
    assert wrong.returncode and "VATT_FAST_ISA" in wrong.stderr and "avx512" in wrong.stderr
    if native.extension.available() != "amx_bf16":
        beyond = python(show, VATT_FAST_ISA="amx_bf16")
        assert beyond.returncode and native.extension.missing() in beyond.stderr


@built
def test_every_lower_instruction_set_can_be_held_to_and_no_higher_one():
    extension, before = native.extension, native.extension.level()
    reachable = LEVELS[: LEVELS.index(extension.available()) + 1]
    try:
        for level in LEVELS:
            if level in reachable:
                extension.hold_to(level)
                assert native.level() == level
            else:
                with pytest.raises(ValueError, match=extension.missing()):
                    extension.hold_to(level)
    finally:
        extension.hold_to(before)


def test_an_extension_of_other_sources_is_refused():
    """As after an update of an editable install that was not built again."""
    done = python("""
        import sys, types
        sys.modules["vatt_fast.kernels._native"] = types.ModuleType("_native")
        from vatt_fast.kernels import native
        print(repr(native.level()), native.explain())
    """)
    assert done.stdout.startswith("'' built from other sources"), done.stdout + done.stderr


def test_without_the_extension_torch_runs_and_says_why():
    with using(None):
        assert native.level() == "" and "VATT_FAST_NATIVE=required" in native.explain()
        for op in OPS:
            q = torch.zeros(1, 3, 2, 64)
            tensors, options = {
                "attention": ((q, q, q), dict(scale=1.0)),
                "drop_token": ((q[0], torch.tensor([0])), {}),
                "contrastive_lse": ((q[0, :, 0], q[0, :, 0]), dict(scale=1.0)),
                "patch_embed": (
                    (q[0], q[0, 0], q[0, 0, :, 0]),
                    dict(scale=1.0, shift=0.0, dtype=torch.float32),
                ),
            }[op]
            assert native.explain() in dispatch.explain(op, *tensors, **options)["native_cpu"]


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(("processor", "level"), [("Nehalem", "base"), ("Haswell", "avx2")])
@built
def test_another_processor_gets_what_it_can_run(processor, level):
    """The interpreter with the extension on an emulated processor: an instruction beyond its own would end it."""
    code = f"""
        import array, importlib.util, math
        spec = importlib.util.spec_from_file_location("_native", {native.extension.__file__!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        assert native.level() == {level!r}, native.level()

        address = lambda numbers: numbers.buffer_info()[0]
        patches, packed = array.array("B", (7 * i % 256 for i in range(3 * 100))), array.array("H", [1]) * 300
        keep = array.array("q", [0, 2])
        place = (300, 100, 0, 100, 1, 3, 1, 1, 1, 1, 1, 100)  # rows of 100 values
        native.patch_pack(address(patches), "uint8", place, address(keep), 0, address(packed), "bf16", 0, 3, 2, 1, 2)
        bits = array.array("f", [x - 128 for i in keep for x in patches[100 * i : 100 * i + 100]]).tobytes()
        assert packed.tobytes() == bytes(200) + b"".join(bits[i + 2 : i + 4] for i in range(0, len(bits), 4))

        products, counts = array.array("f", [0]) * 64, array.array("i", [-1]) * 32  # 2 clips, 32 texts, every score 0
        row, col, pos = (array.array("d", [0]) * size for size in (2, 32, 2))
        scratch = array.array("f", [0]) * native.nce_scratch_floats(2, 32)
        chunk = (address(products), 32, 2, 32, 0, address(counts), 0, 1, 1.0, False, 2, 0, 0, 0, 0)
        native.nce_forward(*chunk, address(row), address(col), address(pos), 0, 0, 0, address(scratch))
        assert [*row, *col, *pos] == [32.0] * 2 + [2.0] * 32 + [1.0] * 2, (row, col, pos)

        if {level != "base"}:  # three tokens that attend to each other alike
            shape, floats = (1, 3, 3, 1, 4), lambda *values: array.array("f", values)
            strided = lambda numbers: (address(numbers), 12, 4, 4)
            q, v, ones, out, lse, scratch = (
                floats(*[0] * 12), floats(*range(12)), floats(*[1] * 12), floats(*[9] * 12), floats(9, 9, 9),
                floats(*[0] * native.short_attention_floats(shape)),
            )
            call = (shape, 1.0, 1, strided(q), strided(q), strided(v), 0, 0, 16, address(scratch))
            native.short_attention_forward(*call, address(out), address(lse))
            assert all(abs(x - y) < 1e-5 for x, y in zip([*out, *lse], [4, 5, 6, 7] * 3 + [math.log(3)] * 3, strict=True)), (out, lse)
            d_q, d_k, d_v = (floats(*[9] * 12) for _ in range(3))
            native.short_attention_backward(
                *call, strided(ones), address(lse), 0, address(d_q), address(d_k), address(d_v), 0, 1
            )
            assert not any([*d_q, *d_k]) and all(abs(x - 1) < 1e-5 for x in d_v), (d_q, d_k, d_v)
        print(native.level(), native.missing())
    """
    done = python(code, "qemu-x86_64", "-cpu", processor)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(level)


# -- the battery on every instruction set ------------------------------------------------------------------------------


@pytest.fixture(params=LEVELS)
def level(request):
    with held_to(request.param, request):
        yield request.param


@pytest.mark.parametrize(
    ("op", "name"), [(op, case.name) for op in OPS if op != "drop_token" for case in PARITY[op]]
)  # it has one version
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_battery_holds_on_every_instruction_set(level, op, name, dtype):
    case = next(case for case in PARITY[op] if case.name == name)
    judged(op, "native_cpu", case, "cpu", DTYPES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
def test_the_battery_finds_no_undefined_behaviour(isa, undefined_behaviour_checked):
    """A sanitizer ends the process at the first: so another process it is."""
    names = dict(VATT_FAST_TEST_EXTENSION=str(undefined_behaviour_checked), VATT_FAST_TEST_ISA=isa)
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "kernels" / "test_ops.py"),
    ]
    done = subprocess.run(
        [*line, "-k", "native_cpu and (test_gradients or dropped) and not fp64 and not fp16"],
        capture_output=True,
        text=True,
        env=os.environ | names,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runtime error" not in done.stdout + done.stderr


@pytest.fixture(scope="session")
def undefined_behaviour_checked(tmp_path_factory) -> Path:
    native_fixtures.skip_without_avx512()
    flags = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-g1"]
    return Path(
        native_fixtures.build(
            tmp_path_factory.mktemp("undefined"), emulated=True, flags=flags
        ).__file__
    )


# -- the build ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
@built
def test_objects_of_one_instruction_set_share_nothing(tmp_path):
    """The linker keeps one of equal weak symbols: another object's code would run instructions that the machine lacks."""
    native_fixtures.build(tmp_path)
    recipe = native_fixtures.recipe()
    objects = [
        tmp_path / f"{Path(source).stem}_{level}.o"
        for source, levels in recipe.OPS.items()
        for level in levels
    ]
    objects = [each for each in objects if each.exists()]
    assert len(objects) > 3 or not recipe.X86
    for each in objects:
        listed = subprocess.run(
            ["nm", str(each)], capture_output=True, text=True, check=True
        ).stdout
        shared = [
            line
            for line in listed.splitlines()
            if f" {line.split()[-2]} " in (" W ", " V ", " u ", " v ", " w ")
        ]
        assert not shared, f"{each.name}: {shared[:5]}"


def _setuptools() -> tuple[int, ...]:
    import importlib.metadata

    try:
        return tuple(int(part) for part in importlib.metadata.version("setuptools").split(".")[:1])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files of a build, in a folder of their own with a space and a dollar in its name."""
    there = tmp_path / "a $folder"
    for name in ("csrc", "kernels", "vatt_fast"):
        shutil.copytree(
            ROOT / name, there / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, there)
    return there


def _backend(checkout: Path, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One call of the build backend, as pip makes it without isolation."""
    if _setuptools() < (77,):
        pytest.skip("a build without isolation needs setuptools >= 77 here")
    line = [sys.executable, "-c", f"import setuptools.build_meta as backend; print(backend.{call})"]
    inherited = {
        name: value for name, value in os.environ.items() if name != "VATT_FAST_NATIVE"
    }  # CI sets it
    return subprocess.run(
        line, capture_output=True, text=True, cwd=checkout, env=inherited | environment
    )


def test_without_a_compiler_the_wheel_is_built_and_says_so_once(checkout):
    done = _backend(checkout, "build_wheel('dist')", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("installed without its C++ kernels") == 1
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"vatt_fast"}
    assert "vatt_fast/kernels/attention/native_cpu.py" in names and not [
        name for name in names if "_native." in name
    ]


def test_where_it_is_required_a_failure_is_an_error(checkout):
    done = _backend(
        checkout, "build_wheel('dist')", CXX="/nonexistent", VATT_FAST_NATIVE="required"
    )
    assert done.returncode and "/nonexistent" in done.stderr


@pytest.mark.slow
@built
def test_the_wheel_holds_the_extension_in_its_place(checkout):
    done = _backend(checkout, "build_wheel('dist')", VATT_FAST_NATIVE="required")
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert [name for name in names if "_native." in name and name.startswith("vatt_fast/kernels/")]
    assert not [name for name in names if name.startswith(("kernels/", "csrc/"))]


def test_the_source_distribution_can_be_built_from(checkout):
    done = _backend(checkout, "build_sdist('dist')")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir() if file.is_file()} <= names
    assert "kernels/native.py" in names
