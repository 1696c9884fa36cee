"""What a user would pick instead of ours computes what it claims, or is absent with a reason."""

import dataclasses
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import calls, peers, towers
from bench.measure import measure_op
from bench.setting import Setting
from vatt_fast.config import TowerConfig, VATTConfig, preset
from vatt_fast.flops import true_flops
from vatt_fast.kernels import parity, patch_embed, patchify
from vatt_fast.kernels.cases import CASES, make

CPU = torch.device("cpu")
SQUARE = CASES["contrastive_lse"]["square"]
# clips that are not square, patches neither: an axis taken for another shows
SMALL = dataclasses.replace(
    preset("tiny"),
    video=TowerConfig(depth=2, dim=32, mlp_dim=64, num_heads=2, head_dim=16),
    frames=8,
    height=16,
    width=24,
    video_patch=(4, 4, 8),
)


def build(name, case, device=CPU):
    return peers.peers("contrastive_lse", (name,))[0].build(case, device)


def pairs(case=SQUARE):
    inputs = make(case, torch.float32, seed=5)
    return inputs["x"].requires_grad_(), inputs["y"].requires_grad_(), inputs["scale"]


def open_clip():
    losses = peers.open_clip_losses()
    if isinstance(losses, str):
        pytest.skip(losses)
    return losses


# -- plain torch ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("attention", "ragged_17"),
        ("attention", "text"),
        ("drop_token", "ragged"),
        ("contrastive_lse", "texts"),
        ("contrastive_lse", "shard_masked"),
        ("patch_embed", "kept_rows"),
        ("patch_embed", "kept_per_clip"),
        ("patch_embed", "odd_clip"),
    ],
)
def test_eager_peers_compute_what_the_ops_do(op, name):
    """Within rounding of fp64, gradients included."""
    case = CASES[op][name]
    inputs = make(case, torch.float32, seed=1)
    exact = calls.truth(op, inputs, torch.float32)
    checked = 0
    for peer in peers.peers(op):
        function = peer.build(case, CPU)
        # on the CPU the flash kernel has no gradient for a mask
        no_kernel = peer.name == "sdpa_flash" and inputs.get("bias") is not None
        if peer.compiled or not peer.alike or isinstance(function, str) or no_kernel:
            continue
        errors = parity.errors(calls.values(function, op, inputs), exact)
        assert max(errors.values()) < 1e-5, (peer.name, errors)
        checked += 1
    assert checked


def test_the_chunked_peer_is_the_materialised_one(monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", 5)
    inputs = make(CASES["contrastive_lse"]["masked"], torch.float32)
    one, other = (
        calls.values(function, "contrastive_lse", inputs)
        for function in (peers.materialised, peers.chunked)
    )
    assert max(parity.errors(other, one).values()) < 1e-6


@pytest.mark.parametrize(
    ("op", "name", "case", "device", "reason"),
    [
        ("attention", "sdpa_cudnn", "text", "cpu", "not on cpu"),
        ("attention", "flash_attn", "text", "cpu", "runs on CUDA"),
        ("attention", "flash_attn", "text", "cuda", "no bias"),
        ("contrastive_lse", "siglip", "texts", "cpu", "one text a clip"),
        ("contrastive_lse", "siglip", "shard_masked", "cpu", "no masks"),
        ("contrastive_lse", "open_clip", "shard", "cpu", "all clips on one device and no masks"),
        ("contrastive_lse", "open_clip", "square", "cpu", "it is not installed"),
    ],
)
def test_absent_peers_say_why(op, name, case, device, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (peer,) = peers.peers(op, (name,))
    assert reason in peer.build(CASES[op][case], torch.device(device))
    with pytest.raises(ValueError, match="unknown peers"):
        peers.peers(op, ("softmax",))


# -- losses -----------------------------------------------------------------------------------


def test_open_clip_computes_what_the_op_does():
    open_clip()
    inputs = make(SQUARE, torch.float32, seed=1)
    found = calls.values(build("open_clip", SQUARE), "contrastive_lse", inputs)
    assert (
        max(parity.errors(found, calls.truth("contrastive_lse", inputs, torch.float32)).values())
        < 1e-5
    )
    low = make(SQUARE, torch.bfloat16, seed=1)
    assert {output.dtype for output in build("open_clip", SQUARE)(**low)} == {torch.float32}


def definition_of_siglip(x, y, scale):
    """The sum over all pairs as the paper writes it."""
    labels = 2 * torch.eye(x.shape[0], dtype=x.dtype) - 1
    return -torch.nn.functional.logsigmoid(labels * (scale * x @ y.T + peers.SIGLIP_BIAS)).sum()


@pytest.mark.parametrize("rows", [1024, 5])
def test_siglip_is_the_papers_sum_in_chunks_or_not(rows, monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", rows)
    x, y, scale = pairs()
    found, expected = (
        build("siglip", SQUARE)(x=x, y=y, scale=scale)[0].sum(),
        definition_of_siglip(x, y, scale),
    )
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_siglip_of_a_shard_is_its_part_of_the_whole(monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", 3)
    x, y, scale = pairs()
    (whole,), (part,) = (
        peers.siglip(x, y, scale=scale),
        peers.siglip(x[5:12], y, scale=scale, first=5),
    )
    torch.testing.assert_close(part, whole[5:12])


def test_another_loss_is_timed_but_never_compared():
    names = ("siglip", "materialised")
    options = dict(rounds=2, warmup=0, backends=("reference",), quick=True)
    here = Setting(CPU, peer_names=names, **options)
    found, absent = measure_op(here, "contrastive_lse", SQUARE, "fp32", ["fwd", "fwd+bwd"])
    assert not absent and len(found) == 6
    for line in found:
        if line.backend == "siglip":
            assert (line.error, line.error_of, line.error_batch) == (None, None, None)
            assert line.ms_p50 > 0 and line.share_of_ceiling is None and not line.ours
        else:
            assert line.error < 1e-5 and line.share_of_ceiling > 0
        assert line.best_peer == ("materialised" if line.ours else None)
    alone = dataclasses.replace(here, peer_names=("siglip",))
    found, _ = measure_op(alone, "contrastive_lse", SQUARE, "fp32", ["fwd"])
    (ours,) = (line for line in found if line.ours)
    assert ours.best_peer is None and ours.speedup_over_best_peer is None


# -- towers -----------------------------------------------------------------------------------


@pytest.fixture
def tower():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    found = towers.videomae(SMALL, CPU)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def clips(batch=2):
    shape = (batch, SMALL.frames, SMALL.height, SMALL.width, 3)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


KEEPS = {
    "batch": torch.tensor([0, 4, 5, 9, 11]),
    "clip": torch.tensor([[1, 2, 3, 7, 10], [0, 2, 6, 8, 11]]),
    "all": None,
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_videomae_reads_our_patches_in_our_order(tower, keep):
    """With our projection's weights its tokens are our op's, for every kept patch."""
    frames = clips()
    video = patchify(frames, SMALL.video_patch)
    with torch.no_grad():
        projection = (
            tower.embeddings.patch_embeddings.projection
        )  # (dim, C, t, h, w); ours (dim, (t, h, w, C))
        weight = projection.weight.permute(0, 2, 3, 4, 1).flatten(1)
        position = tower.embeddings.position_embeddings[0]
        ours = patch_embed(
            video, weight, projection.bias, position, keep, scale=2 / 255, shift=-1.0
        )
        inputs = towers.videomae_inputs(SMALL, frames, keep)
        theirs = tower.embeddings(**inputs)
    assert inputs["pixel_values"].shape == (2, SMALL.frames, 3, SMALL.height, SMALL.width)
    assert theirs.shape[1] == (SMALL.num_video_patches if keep is None else keep.shape[-1])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_videomae_costs_what_our_formula_says_but_for_the_agg_token(tower, drop_rate):
    kept = SMALL.num_video_patches - int(drop_rate * SMALL.num_video_patches)
    keep = torch.arange(kept) if drop_rate else None
    inputs = towers.videomae_inputs(SMALL, clips(1), keep)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the CPU's flash kernel is not counted
        towers.videomae_features(tower, inputs)
    video = SMALL.video
    of_agg = video.depth * (
        2 * (4 * video.dim**2 + 2 * video.dim * video.mlp_dim)
        + 4 * ((kept + 1) ** 2 - kept**2) * video.dim
    )
    ours = true_flops(SMALL, drop_rate, drop_first=False, modalities=("video",))["video"]
    assert counter.get_total_flops() == ours - of_agg


def test_videomae_is_absent_with_a_reason(monkeypatch):
    assert "modality_agnostic" in towers.videomae(preset("agnostic_medium"), CPU)
    assert "VideoMAE pads nothing" in towers.videomae(dataclasses.replace(SMALL, frames=9), CPU)
    narrow = dataclasses.replace(SMALL, video=dataclasses.replace(SMALL.video, num_heads=1))
    assert "1 heads of 16 do not make dim 32" in towers.videomae(narrow, CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert towers.videomae(VATTConfig(), CPU).startswith("transformers cannot be imported: ")
