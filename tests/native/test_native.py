"""The C++ extension as a whole: how it is built and packed, what it chooses, and the battery on
every instruction set."""

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

from vatt_fast.kernels import dispatch, native, native_interface
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


# -- the choice -----------------------------------------------------------------------------------


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


@built
def test_the_interface_is_what_the_bindings_say(tmp_path):
    """A changed argument is another interface; comments, and where a line ends, are not."""
    shutil.copytree(ROOT / "csrc" / "bind", tmp_path / "bind")
    before = native_interface.digest(tmp_path / "bind")
    assert native.extension.INTERFACE == before == native_interface.expected()
    file = tmp_path / "bind" / "drop_token.cpp"
    code = file.read_text()
    file.write_text("// another word\n" + code.replace(", ", ",\n    "))
    assert native_interface.digest(tmp_path / "bind") == before
    file.write_text(code.replace('"keep_stride"_a', '"keep_step"_a'))
    assert native_interface.digest(tmp_path / "bind") != before


@built
@pytest.mark.skipif(os.name != "posix", reason="links a folder")
@pytest.mark.parametrize("other", [False, True], ids=["of_these_sources", "of_other_sources"])
def test_a_plain_installs_extension_is_found_from_a_checkout(tmp_path, other):
    """The checkout's kernels, in which nothing was built, hide those of the installed package."""
    clone, installed = tmp_path / "clone", tmp_path / "site" / "vatt_fast" / "kernels"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("kernels", "csrc", "vatt_fast"):
        shutil.copytree(ROOT / name, clone / name, ignore=ignored, symlinks=True)
    if not (clone / "vatt_fast" / "kernels").exists():
        (clone / "vatt_fast" / "kernels").symlink_to(clone / "kernels")
    installed.mkdir(parents=True)
    shutil.copy(native.extension.__file__, installed)
    if other:
        with open(clone / "csrc" / "bind" / "drop_token.cpp", "a") as bindings:
            bindings.write("int further;\n")
    code = """
        import sys  # an editable install, if there is one here, would be found first
        sys.meta_path = [
            each for each in sys.meta_path if not each.__module__.startswith("__editable__")
        ]
        from vatt_fast.kernels import native
        print(native.__file__, getattr(native.extension, "__file__", None), native.explain())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=clone,
        env=os.environ | dict(PYTHONPATH=str(tmp_path / "site"), VATT_FAST_ISA=""),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    file, extension, *explained = done.stdout.split()
    assert clone in Path(file).parents
    if other:
        assert extension == "None" and explained[:2] == ["built", "from"], done.stdout
    else:
        assert installed in Path(extension).parents, done.stdout


@built
def test_a_call_that_says_something_else_names_the_argument():
    """Arguments are keywords: one that a binding lacks, or that it is not given, is an error."""
    with pytest.raises(TypeError, match="keep_stride"):
        native.extension.drop_token_take(tokens=0, keep_step=0)
    with pytest.raises(TypeError, match="first_own"):
        native.extension.ContrastiveLseChunk(products=0, first=0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.extension.patch_embed_finish_weight(*range(10))


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
    """The interpreter with the extension on an emulated processor: an instruction beyond its own
    would end it."""
    code = f"""
        import array, importlib.util, math
        spec = importlib.util.spec_from_file_location("_native", {native.extension.__file__!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        assert native.level() == {level!r}, native.level()

        address = lambda numbers: numbers.buffer_info()[0]
        patches = array.array("B", (7 * i % 256 for i in range(3 * 100)))
        packed, keep = array.array("H", [1]) * 300, array.array("q", [0, 2])
        rows = native.Patches(  # rows of 100 values
            data=address(patches), element="uint8", stride_b=300, stride_t=100, stride_h=0,
            stride_w=100, stride_c=1, T=3, H=1, W=1, frames=1, lines=1, columns=1, channels=100,
            keep=address(keep), keep_stride=0,
        )
        native.patch_embed_pack(
            patches=rows, packed=address(packed), element="bf16", first=0, count=3, K=2, A=1,
            threads=2,
        )
        kept = [x - 128 for i in keep for x in patches[100 * i : 100 * i + 100]]
        bits = array.array("f", kept).tobytes()
        upper = b"".join(bits[i + 2 : i + 4] for i in range(0, len(bits), 4))
        assert packed.tobytes() == bytes(200) + upper

        # 2 clips, 32 texts, every score 0
        products, counts = array.array("f", [0]) * 64, array.array("i", [-1]) * 32
        row, col, pos = (array.array("d", [0]) * size for size in (2, 32, 2))
        floats = native.contrastive_lse_scratch_floats(rows=2, columns=32)
        scratch = array.array("f", [0]) * floats
        chunk = native.ContrastiveLseChunk(
            products=address(products), products_stride=32, rows=2, columns=32, x_counts=0,
            y_counts=address(counts), first_own=0, texts_per_clip=1, scale=1.0, running=False,
            threads=2, x=0, y_panels=0, dim=0, weights=0, stride=0, bf16_weights=False,
        )
        native.contrastive_lse_forward(
            chunk=chunk, row=address(row), col=address(col), pos=address(pos), row_peak=0,
            col_peak=0, pos_peak=0, scratch=address(scratch),
        )
        assert [*row, *col, *pos] == [32.0] * 2 + [2.0] * 32 + [1.0] * 2, (row, col, pos)

        if {level != "base"}:  # three tokens that attend to each other alike
            shape = (1, 3, 3, 1, 4)
            floats = lambda *values: array.array("f", values)
            strided = lambda numbers: (address(numbers), 12, 4, 4)
            q, v, ones = floats(*[0] * 12), floats(*range(12)), floats(*[1] * 12)
            out, lse = floats(*[9] * 12), floats(9, 9, 9)
            scratch = floats(*[0] * native.short_attention_floats(shape=shape))
            call = dict(
                shape=shape, scale=1.0, threads=1, q=strided(q), k=strided(q), v=strided(v),
                key_mask=0, bias=0, bias_row=16, scratch=address(scratch), lse=address(lse),
            )
            native.short_attention_forward(**call, out=address(out))
            expected = [4, 5, 6, 7] * 3 + [math.log(3)] * 3
            differences = [x - y for x, y in zip([*out, *lse], expected, strict=True)]
            assert all(abs(x) < 1e-5 for x in differences), (out, lse)
            d_q, d_k, d_v = (floats(*[9] * 12) for _ in range(3))
            native.short_attention_backward(
                **call, d_out=strided(ones), d_lse=0, d_q=address(d_q), d_k=address(d_k),
                d_v=address(d_v), d_bias=0, groups=1,
            )
            assert not any([*d_q, *d_k]), (d_q, d_k)
            assert all(abs(x - 1) < 1e-5 for x in d_v), d_v
        print(native.level(), native.missing())
    """
    done = python(code, "qemu-x86_64", "-cpu", processor)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(level)


# -- the battery on every instruction set ---------------------------------------------------------


@pytest.fixture(params=LEVELS)
def level(request):
    with held_to(request.param, request):
        yield request.param


@pytest.mark.parametrize(
    ("op", "name"),
    # drop_token has one version
    [(op, case.name) for op in OPS if op != "drop_token" for case in PARITY[op]],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_battery_holds_on_every_instruction_set(level, op, name, dtype):
    case = next(case for case in PARITY[op] if case.name == name)
    judged(op, "native_cpu", case, "cpu", DTYPES[dtype])


def ran_sanitized(line: list[str], extension: Path, isa: str) -> None:
    """A sanitizer ends the process at the first fault, so another process it is; pytest leaves that
    one's output alone, or it would be lost with it."""
    names = dict(VATT_FAST_TEST_EXTENSION=str(extension), VATT_FAST_TEST_ISA=isa)
    done = subprocess.run(
        [sys.executable, *line], capture_output=True, text=True, env=os.environ | names
    )
    said = [each for each in done.stderr.splitlines() if "runtime error" in each]
    assert not said, "the sanitizer said:\n" + "\n".join(said)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
def test_the_battery_finds_no_undefined_behaviour(isa, undefined_behaviour_checked):
    test = str(ROOT / "tests" / "kernels" / "test_ops.py")
    wanted = "native_cpu and (test_gradients or dropped) and not fp64 and not fp16"
    line = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", test, "-k", wanted]
    ran_sanitized(line, undefined_behaviour_checked, isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
def test_exp_of_a_nan_is_defined_whatever_its_bits(isa, undefined_behaviour_checked):
    """A text that is taken out may hold any nan. Its score's exponent is computed before the mask
    is applied, from bits that overflowed as a signed sum."""
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
        import native_fixtures, torch
        from vatt_fast.kernels.contrastive_lse import native_cpu
        y = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)
        y[7] = torch.tensor(0x7FC000FC, dtype=torch.int32).view(torch.float32)
        valid = torch.arange(40) != 7
        for bound in (14.5, None):
            options = dict(scale=14.0, texts_per_clip=1, first=0, y_valid=valid, bound=bound)
            sums = native_cpu.forward(y[8:], y, **options)
            assert not any(each.isnan().any() for each in sums)
            native_cpu.backward(*map(torch.ones_like, sums), y[8:], y, *sums, **options)
    """
    ran_sanitized(["-c", textwrap.dedent(code)], undefined_behaviour_checked, isa)


@pytest.fixture(scope="session")
def undefined_behaviour_checked(tmp_path_factory) -> Path:
    native_fixtures.skip_without_avx512()
    flags = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-g1"]
    folder = tmp_path_factory.mktemp("undefined")
    return Path(native_fixtures.build(folder, emulated=True, flags=flags).__file__)


# -- the build ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
@built
def test_objects_of_one_instruction_set_share_nothing(tmp_path):
    """The linker keeps one of equal weak symbols: another object's code would run instructions that
    the machine lacks."""
    native_fixtures.build(tmp_path)
    recipe = native_fixtures.recipe()
    objects = [
        tmp_path / name
        for source in recipe.sources()
        for level, name in source.objects.items()
        if level
    ]
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
    # CI sets it
    inherited = {name: value for name, value in os.environ.items() if name != "VATT_FAST_NATIVE"}
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
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        written = wheel.read(f"vatt_fast/kernels/{native_interface.WRITTEN}").decode()
    assert written == native_interface.digest(checkout / "csrc" / "bind")
    assert not [name for name in names if name.startswith(("kernels/", "csrc/"))]


def test_the_source_distribution_can_be_built_from(checkout):
    done = _backend(checkout, "build_sdist('dist')")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    sources = {
        str(file.relative_to(ROOT)) for file in files if file.suffix in (".cpp", ".h", ".py")
    }
    assert len(sources) > 20 and sources <= names
    assert "kernels/native.py" in names
