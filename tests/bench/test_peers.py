"""What a user would pick instead of ours computes what it claims, or is absent with a reason."""

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F

from bench import calls, peers
from bench.measure import measure_op
from bench.setting import Setting
from vatt_fast.kernels import parity
from vatt_fast.kernels.cases import CASES, make

CPU = torch.device("cpu")
SQUARE = CASES["contrastive_lse"]["square"]


def build(name):
    return peers.PEERS["contrastive_lse"][name].build(SQUARE, CPU)


# -- plain torch ------------------------------------------------------------------------------


EAGER = {
    "attention": ("ragged_17", "text"),
    "drop_token": ("ragged",),
    "contrastive_lse": ("texts", "shard_masked"),
    "patch_embed": ("kept_rows", "kept_per_clip", "odd_clip"),
}


@pytest.mark.parametrize(("op", "name"), [(op, n) for op, names in EAGER.items() for n in names])
def test_eager_peers_compute_what_the_ops_do(op, name):
    """Within rounding of fp64, gradients included."""
    case = CASES[op][name]
    inputs = make(case, torch.float32, seed=1)
    exact = calls.truth(op, inputs, torch.float32)
    checked = 0
    for name, peer in peers.peers(op).items():
        function = peer.build(case, CPU)
        # on the CPU the flash kernel has no gradient for a mask
        no_kernel = name == "sdpa_flash" and inputs.get("bias") is not None
        compiled = name.endswith("_compiled")
        if compiled or not peer.alike or isinstance(function, str) or no_kernel:
            continue
        errors = parity.errors(calls.values(function, op, inputs), exact)
        assert max(errors.values()) < 1e-5, (name, errors)
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
    assert reason in peers.PEERS[op][name].build(CASES[op][case], torch.device(device))
    with pytest.raises(ValueError, match="unknown peers"):
        peers.peers(op, ("softmax",))


# -- losses -----------------------------------------------------------------------------------


def test_open_clip_computes_what_the_op_does():
    if isinstance(function := build("open_clip"), str):
        pytest.skip(function)
    inputs = make(SQUARE, torch.float32, seed=1)
    exact = calls.truth("contrastive_lse", inputs, torch.float32)
    found = calls.values(function, "contrastive_lse", inputs)
    assert max(parity.errors(found, exact).values()) < 1e-5
    low = make(SQUARE, torch.bfloat16, seed=1)
    assert {output.dtype for output in function(**low)} == {torch.float32}


@pytest.mark.parametrize("rows", [1024, 5])
def test_siglip_is_the_papers_sum_in_chunks_or_not(rows, monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", rows)
    inputs = make(SQUARE, torch.float32, seed=5)
    x, y, scale = inputs["x"].requires_grad_(), inputs["y"].requires_grad_(), inputs["scale"]
    each = build("siglip")(x=x, y=y, scale=scale)[0]
    labels = 2 * torch.eye(len(x)) - 1  # the sum over all pairs as the paper writes it
    whole = -F.logsigmoid(labels * (scale * x @ y.T + peers.SIGLIP_BIAS)).sum()
    torch.testing.assert_close(each.sum(), whole)
    found, expected = (torch.autograd.grad(loss, (x, y)) for loss in (each.sum(), whole))
    torch.testing.assert_close(found, expected)
    (part,) = peers.siglip(x[5:12], y, scale=scale, first=5)  # of another device
    torch.testing.assert_close(part, each[5:12])


def test_another_loss_is_timed_but_never_compared():
    options = dict(rounds=2, warmup=0, backends=("reference",), quick=True)
    here = Setting(CPU, peer_names=("siglip", "materialised"), **options)
    found, absent = measure_op(here, "contrastive_lse", SQUARE, "fp32", ["fwd", "fwd+bwd"])
    assert not absent and len(found) == 6
    for line in found:
        if line.backend == "siglip":
            assert line.ms_p50 > 0 and not line.ours
            told = (line.error, line.error_of, line.error_batch, line.share_of_ceiling)
            assert told == (None, None, None, None)
        else:
            assert line.error < 1e-5 and line.share_of_ceiling > 0
        assert line.best_peer == ("materialised" if line.ours else None)
    alone = dataclasses.replace(here, peer_names=("siglip",))
    (ours, _), _ = measure_op(alone, "contrastive_lse", SQUARE, "fp32", ["fwd"])
    assert ours.ours and ours.best_peer is None and ours.speedup_over_best_peer is None
