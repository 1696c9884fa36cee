"""How a kernel's tiles are chosen: forced, tuned, or by its own heuristic; never by a clock."""

import json

import pytest
import torch

from vatt_fast.kernels import tiles
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.settings import force_tiles

HEURISTIC = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A table for sm_90 that knows one shape of one kernel."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    (folder / "sm_90.json").write_text(
        json.dumps({"attention_forward": {"bf16 queries=785 keys=785": {"BLOCK": 128}}})
    )
    monkeypatch.setattr(tiles, "__file__", str(tmp_path / "tiles.py"))
    tiles.table.cache_clear()
    yield {"BLOCK": 128}
    tiles.table.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "arch", "dtype", "queries", "known"),
    [
        ("attention_forward", "sm_90", torch.bfloat16, 785, True),
        ("attention_forward", "sm_90", torch.bfloat16, 786, False),
        ("attention_forward", "sm_90", torch.float16, 785, False),
        ("attention_forward", "sm_80", torch.bfloat16, 785, False),
        ("attention_d_q", "sm_90", torch.bfloat16, 785, False),
    ],
)
def test_a_tuned_shape_is_found_and_only_that(tuned, kernel, arch, dtype, queries, known):
    assert tiles.choose(kernel, arch, dtype, HEURISTIC, queries=queries, keys=785) == (
        tuned if known else HEURISTIC
    )


def test_forced_tiles_come_first_and_end_with_their_block(tuned):
    def chosen():
        return tiles.choose(
            "attention_forward", "sm_90", torch.bfloat16, HEURISTIC, queries=785, keys=785
        )

    with force_tiles(attention_forward={"BLOCK": 16}):
        assert chosen() == {"BLOCK": 16}
        with force_tiles(attention_forward={"BLOCK": 32}):
            assert chosen() == {"BLOCK": 32}
        assert chosen() == {"BLOCK": 16}
        assert (
            tiles.choose("attention_d_q", "sm_90", torch.bfloat16, HEURISTIC, queries=785)
            == HEURISTIC
        )
    assert chosen() == tuned


def test_a_plan_is_made_once_and_forced_tiles_come_first():
    asked = []

    @tiles.memoised
    def plan(kernel, *shape):
        asked.append((kernel, *shape))
        return HEURISTIC

    for shape in ((1, 2), (1, 2), (1, 3)):
        assert plan("attention_forward", *shape) == HEURISTIC
    with force_tiles(attention_forward={"BLOCK": 16}):
        assert plan("attention_forward", 1, 2) == {"BLOCK": 16}
        assert plan("attention_d_q", 1, 2) == HEURISTIC
    assert plan("attention_forward", 1, 2) == HEURISTIC
    assert asked == [
        ("attention_forward", 1, 2),
        ("attention_forward", 1, 3),
        ("attention_d_q", 1, 2),
    ]


def test_committed_tables_name_known_kernels_and_shapes():
    """A renamed kernel or argument would leave its tuned tiles unread."""
    import importlib
    from pathlib import Path

    pytest.importorskip("triton", reason="the kernels import triton, which is not installed")
    known = {
        name
        for op in OPS
        for name in importlib.import_module(f"vatt_fast.kernels.{op}.triton_gpu").TUNING
    }
    assert known
    for path in (Path(tiles.__file__).parent / "tiles").glob("*.json"):
        assert set(json.loads(path.read_text())) <= known, path.name


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        *((f"sm_{n}", f"sm_{n}") for n in (80, 89, 90, 100, 120)),
        *(("sm_86", "sm_89"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("sm_110", "sm_100")),
        *(("sm_121", "sm_120"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"), ("gfx1201", "gfx942")),
    ],
)
def test_an_architecture_that_was_never_compiled_for_takes_its_familys_tiles(arch, family):
    """They were chosen so that nothing spills there."""
    from vatt_fast.kernels.contrastive_lse import triton_gpu
    from vatt_fast.kernels.patch_embed import triton_tiles

    def chosen(arch):
        for running in (False, True):
            sizes = (256, 2048, 512, "ieee", running)
            yield triton_gpu._choose("contrastive_lse_forward", arch, torch.bfloat16, *sizes)
        for name, heuristic in triton_tiles.HEURISTICS.items():
            for k in (128, 3072):
                yield name, heuristic(arch, 2, 6272, 1024, k, 1)

    assert tiles.family(arch) == family
    assert list(chosen(arch)) == list(chosen(family))


@pytest.mark.parametrize(("hip", "known"), [(None, True), ("7.0", False)])
def test_no_candidate_has_an_option_that_its_compiler_lacks(monkeypatch, hip, known):
    import importlib

    from vatt_fast.kernels.contrastive_lse import triton_gpu

    before = triton_gpu.__dict__.copy()
    monkeypatch.setattr(torch.version, "hip", hip)
    try:
        candidates = importlib.reload(triton_gpu).TUNING["contrastive_lse_forward"]
        assert any("maxnreg" in each for each in candidates) == known and len(candidates) >= 18
    finally:
        triton_gpu.__dict__.update(before)
