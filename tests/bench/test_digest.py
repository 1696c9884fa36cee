"""When a result line no longer speaks of the code: a digest of what it ran, not of how it reads."""

import shutil
from dataclasses import replace

import pytest
import torch
from bench_lines import LINE

from bench import digest, lines

FP32 = replace(LINE, dtype="fp32", backend="native_cpu")
BF16 = replace(FP32, dtype="bf16")
AUTO = replace(BF16, backend="auto")
STEP = replace(BF16, op="step", backend="auto_compiled")
LSE = replace(BF16, op="contrastive_lse")
LINES = {"fp32": FP32, "bf16": BF16, "auto": AUTO, "step": STEP, "lse": LSE}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the sources that digests are taken of."""
    for folder in ("kernels", "csrc", "vatt_fast", "bench"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "figures", "build")
        shutil.copytree(digest.ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(digest.ROOT / "setup.py", tmp_path)
    monkeypatch.setattr(digest, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget():
    for cached in (digest.of, digest._units, digest._imported, digest._peer_units):
        cached.cache_clear()


def taken():
    forget()
    return {name: lines.source_of(line) for name, line in LINES.items()}


def changed(before):
    return {name for name, now in taken().items() if now != before[name]}


def edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_words_and_formatting_change_nothing(tree):
    before = taken()
    for name in ("kernels/attention/native_cpu.py", "kernels/dispatch.py", "vatt_fast/model.py"):
        text = (tree / name).read_text()
        assert text.startswith('"""')
        text = '"""Other words. ' + text[3:].replace("\ndef ", "\n# a comment\n\n\ndef ")
        (tree / name).write_text(text.replace("(\n", "(  # and another\n\n"))
    path = tree / "csrc/attention/forward.cpp"
    text = path.read_text().replace("{\n", "{  // opened\n\n")
    path.write_text(f"/* a word\n   more */\n{text}")
    assert not changed(before)


def test_moves_change_nothing(tree):
    before = taken()
    old = tree / "kernels/registration.py"
    old.rename(tree / "kernels/registered.py")
    for path in tree.glob("kernels/**/*.py"):
        path.write_text(path.read_text().replace("registration", "registered"))
    source = tree / "csrc/attention/forward.cpp"
    source.rename(source.with_name(f"{source.stem}_moved_attention.cpp"))
    assert not changed(before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("csrc/attention/forward.cpp", {"bf16", "auto", "step"}),  # lines in fp32 stay fresh
        ("csrc/attention/short.cpp", {"fp32"}),
        ("csrc/common/products.h", {"bf16", "auto", "lse", "step"}),
        ("kernels/native.py", set(LINES)),
        ("vatt_fast/model.py", {"step"}),
        ("kernels/cases.py", set()),
        ("kernels/attention/triton_gpu.py", set()),  # not run on a CPU
        ("kernels/attention/torch_sdpa.py", {"auto", "step"}),  # dispatch may choose it
        ("kernels/contrastive_lse/native_cpu.py", {"lse", "step"}),
        ("bench/peers.py", set()),
        ("vatt_fast/cli.py", set()),
    ],
)
def test_a_change_counts_for_the_lines_that_run_it(tree, name, expected):
    before = taken()
    (tree / name).open("a").write("\nMORE = 1;\n")
    assert changed(before) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("\nSIGLIP_BIAS = -10.0", "\nMORE = 1\nSIGLIP_BIAS = -10.0", set()),
        ("SIGLIP_BIAS = -10.0", "SIGLIP_BIAS = -9.0", {"siglip"}),  # _siglip_rows names it
        ("torch.softmax(scores, -1)", "torch.softmax(scores, -2)", {"eager", "compared"}),
        ('"eager": _torch(', '"eager": Peer(', {"eager", "compared"}),
        ("_CHUNK = 1024", "_CHUNK = 512", {"chunked", "siglip"}),
        ("dynamic=False", "dynamic=True", {"eager", "compared", "chunked", "siglip"}),
    ],
)
def test_a_change_of_the_peers_counts_for_those_that_run_it(tree, old, new, expected):
    theirs = {
        "eager": replace(LINE, backend="eager", ours=False),
        "compared": replace(FP32, best_peer="eager"),
        "ours": FP32,
        "chunked": replace(LSE, backend="chunked", ours=False),
        "siglip": replace(LSE, backend="siglip", ours=False),
        "step": replace(STEP, best_peer="plain"),
    }
    before = {name: lines.source_of(line) for name, line in theirs.items()}
    edit(tree / "bench/peers.py", old, new)
    forget()
    assert {name for name in theirs if lines.source_of(theirs[name]) != before[name]} == expected


def test_a_backend_under_other_tiles_runs_the_same_sources(tree):
    tiled = replace(LINE, backend=f"{LINE.backend} 128x64 w8 s2")
    assert lines.source_of(tiled) == lines.source_of(LINE)


def test_a_choice_of_dispatch_counts_for_auto(monkeypatch):
    key, rows = ("torch", "cpu"), digest.backends.PREFERENCE["torch", "cpu"]
    before = taken()
    kept = tuple(row for row in rows if (row.op, row.backend) != ("attention", "torch_sdpa"))
    monkeypatch.setitem(digest.backends.PREFERENCE, key, kept)
    assert changed(before) == {"auto", "step"}
    monkeypatch.undo()
    forget()


def test_cpp_is_read_as_tokens():
    one = '#include "a.h"\nint f(int x) { return x>>1; }  // half\nauto s = "// no comment";'
    same = 'int f(int x)\n{\n  /* half */ return x >> 1;\n}\nauto s = "// no comment";'
    assert digest.cpp_unit(one) == digest.cpp_unit(same)
    assert digest.cpp_unit(one) != digest.cpp_unit(one.replace("no comment", "a comment"))
    assert digest.cpp_unit(one) != digest.cpp_unit(one.replace(">>1", ">>2"))


def test_stale_lines_say_why():
    fresh = replace(FP32, versions={"torch": torch.__version__}, source=lines.source_of(FP32))
    assert lines.stale(fresh) is None
    assert lines.stale(replace(fresh, stolen=0.04)) is None
    assert "other machines" in lines.stale(replace(fresh, stolen=0.3))
    assert "changed" in lines.stale(replace(fresh, source="0123456789ab"))
    assert "changed" in lines.stale(replace(fresh, source=""))
    assert "torch was 1.0" in lines.stale(replace(fresh, versions={"torch": "1.0"}))


def test_committed_lines_are_read():
    assert lines.files()
    for path in lines.files():
        names = {lines.file_of(line.device, line.versions).name for line in lines.read(path)}
        assert path.name in names
