"""What a user would pick instead of ours: the libraries' losses are those they claim to be, or are absent with a reason."""

import dataclasses
import sys

import pytest
import torch

from bench import op_calls, peers, run
from vatt_fast.kernels.cases import CASES

CPU = torch.device("cpu")
SQUARE = CASES["nce"]["square"]


def build(name, case, device=CPU):
    return peers.peers("nce", (name,))[0].build(case, device)


def pairs(case=SQUARE):
    inputs = op_calls.make(case, torch.float32, seed=5)
    return inputs["x"].requires_grad_(), inputs["y"].requires_grad_(), inputs["scale"]


def open_clip():
    losses = peers.open_clip_losses()
    if isinstance(losses, str):
        pytest.skip(losses)
    return losses


# -- losses ------------------------------------------------------------------------------------------------------------


def test_open_clips_loss_is_what_its_log_sums_make():
    loss = open_clip().ClipLoss()
    x, y, scale = pairs()
    row, col, pos = build("open_clip", SQUARE)(x=x, y=y, scale=scale)
    found, expected = (row - pos + col - pos).mean() / 2, loss(x, y, scale)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_open_clip_computes_what_the_op_does():
    open_clip()
    inputs = op_calls.make(SQUARE, torch.float32, seed=1)
    found = op_calls.values(build("open_clip", SQUARE), "nce", inputs)
    assert max(op_calls.errors(found, op_calls.truth("nce", inputs, torch.float32)).values()) < 1e-5
    low = op_calls.make(SQUARE, torch.bfloat16, seed=1)
    assert {output.dtype for output in build("open_clip", SQUARE)(**low)} == {torch.float32}


def test_open_clip_is_absent_with_a_reason(monkeypatch):
    for name in ("texts", "shard", "masked"):
        assert "one text a clip, all clips on one device and no masks" in build("open_clip", CASES["nce"][name])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert build("open_clip", SQUARE) == "open_clip_torch cannot be imported: it is not installed"


def definition_of_siglip(x, y, scale):
    """The sum over all pairs as the paper writes it."""
    labels = 2 * torch.eye(x.shape[0], dtype=x.dtype) - 1
    return -torch.nn.functional.logsigmoid(labels * (scale * x @ y.T + peers.SIGLIP_BIAS)).sum()


@pytest.mark.parametrize("rows", [1024, 5])
def test_siglip_is_the_papers_sum_in_chunks_or_not(rows, monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", rows)
    x, y, scale = pairs()
    found, expected = build("siglip", SQUARE)(x=x, y=y, scale=scale)[0].sum(), definition_of_siglip(x, y, scale)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_siglip_is_open_clips():
    loss = open_clip().SigLipLoss()
    x, y, scale = pairs()
    torch.testing.assert_close(peers.siglip(x, y, scale=scale)[0].mean(), loss(x, y, scale, torch.tensor(peers.SIGLIP_BIAS)))


def test_siglip_of_a_shard_is_its_part_of_the_whole(monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", 3)
    x, y, scale = pairs()
    (whole,), (part,) = peers.siglip(x, y, scale=scale), peers.siglip(x[5:12], y, scale=scale, first=5)
    torch.testing.assert_close(part, whole[5:12])
    assert "one text a clip" in build("siglip", CASES["nce"]["texts"]) and "no masks" in build("siglip", CASES["nce"]["shard_masked"])


def test_another_loss_is_timed_but_never_compared():
    names = ("siglip", "materialised")
    setting = run.Setting(CPU, rounds=2, warmup=0, backends=("reference",), peer_names=names, quick_ceilings=True)
    lines, absent = run.measure(setting, "nce", SQUARE, "fp32", ["fwd", "fwd+bwd"])
    assert not absent and len(lines) == 6
    for line in lines:
        told = run.describe(line)
        if line.backend == "siglip":
            assert (line.error, line.error_of, line.error_batch) == (None, None, None) and line.ms_p50 > 0 and not line.ours
            assert "another loss in the same role" in told and "error" not in told
        else:
            assert line.error < 1e-5 and "another loss" not in told
        assert line.best_peer == ("materialised" if line.ours else None)

    alone = dataclasses.replace(setting, peer_names=("siglip",))
    ours = next(line for line in run.measure(alone, "nce", SQUARE, "fp32", ["fwd"])[0] if line.ours)
    assert ours.best_peer is None and ours.speedup_over_best_peer is None
