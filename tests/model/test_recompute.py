"""Blocks computed again in the backward pass, and compiled ones: the same step in less memory."""

import contextlib
import dataclasses

import pytest
import torch
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from vatt_fast import recompute
from vatt_fast.config import PRESETS
from vatt_fast.kernels import SAVE_OPS, contrastive_lse, registration
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT

CLIPS = 4
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    video=dataclasses.replace(PRESETS["tiny"].video, depth=8),
    frames=8,
    height=32,
    width=32,
    samples=2560,
    vocab_size=30,
    texts_per_clip=2,
)
DEPTH = SMALL.video.depth + SMALL.audio.depth + SMALL.text.depth


@contextlib.contextmanager
def calls():
    """Which ops run, as (name, "fwd" or "bwd")."""
    found, choose = [], registration.choose

    def watched(name, mode, *arguments, **options):
        found.append((name, mode))
        return choose(name, mode, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "choose", watched)
        yield found


def step(config=SMALL, **execution):
    """Loss and gradients of one batch."""
    torch.manual_seed(0)
    model = VATT(config).train()
    model.set_execution(**execution)
    inputs = (
        torch.randint(0, 256, (CLIPS, 8, 32, 32, 3), dtype=torch.uint8),
        torch.rand(CLIPS, config.samples) * 2 - 1,
        torch.randint(1, 30, (CLIPS, 2, 16)),
    )
    torch.manual_seed(1)  # dropout
    loss = vatt_loss(model(*inputs), config).total
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("how", ["blocks", "ops"])
def test_computing_again_changes_no_bit(how, dropout):
    config = dataclasses.replace(SMALL, dropout=dropout)
    assert equal(step(config), step(config, recompute=how))


@pytest.mark.parametrize(("how", "runs"), [("none", 1), ("blocks", 2), ("ops", 1)])
def test_attention_runs_twice_only_where_whole_blocks_are_computed_again(how, runs):
    with calls() as found:
        step(recompute=how)
    assert found.count(("attention", "fwd")) == runs * DEPTH
    assert found.count(("attention", "bwd")) == DEPTH


def test_memory_falls_with_what_is_computed_again():
    model, peaks = VATT(SMALL).train(), {}
    tokens = torch.randn(8, 200, SMALL.video.dim)
    for how in ("none", "ops", "blocks"):
        model.set_execution(recompute=how)
        model.zero_grad()
        with LiveBytes() as live:
            model.video_encoder(tokens).sum().backward()
        peaks[how] = live.peak
    assert peaks["blocks"] < peaks["ops"] < 0.6 * peaks["none"], peaks


def test_a_trunk_that_modalities_share_is_computed_again_under_autocast():
    """Its weights are cast once forwards, and again for each modality backwards."""
    towers: dict = dict.fromkeys(("video", "audio", "text"), SMALL.audio)
    config = dataclasses.replace(SMALL, kind="modality_agnostic", **towers)
    with torch.autocast("cpu", torch.bfloat16):
        once, again = step(config), step(config, recompute="ops")
    assert torch.equal(once["loss"], again["loss"]) and once.keys() == again.keys()
    for name, value in once.items():  # modalities' gradients are added in fp32, once in bf16
        assert (again[name] - value).norm() <= 0.05 * value.norm() + 1e-3, name


def test_a_policy_of_others_keeps_our_ops():
    x, y = torch.randn(2, 6, 8).unbind()
    x.requires_grad_()

    def loss(x):
        row, col, pos = contrastive_lse(x, y, scale=1.0)
        return (row + col - 2 * pos).sum()

    for ops, runs in (([], 2), (SAVE_OPS, 1)):
        with calls() as found:
            checkpoint(
                loss,
                x,
                use_reentrant=False,
                context_fn=lambda ops=ops: create_selective_checkpoint_contexts(list(ops)),
            ).backward()
        assert found.count(("contrastive_lse", "fwd")) == runs


@pytest.mark.parametrize("how", ["none", "blocks", "ops"])
def test_compiled_blocks_train_the_same_model(how, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(recompute, "_BACKEND", backend)
    recompute.compiled.cache_clear()
    torch._dynamo.reset()
    with calls() as found:
        compiled = step(recompute=how, compile="blocks")
    recompute.compiled.cache_clear()
    plain = step()
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)
    # all blocks of a tower share one, but the last, which works for AGG alone
    assert 0 < len(graphs) < DEPTH
    assert found.count(("attention", "fwd")) == (2 if how == "blocks" else 1) * DEPTH


def test_evaluation_is_not_compiled(monkeypatch):
    monkeypatch.setattr(recompute, "_BACKEND", None)  # would fail
    model = VATT(SMALL).eval()
    model.set_execution(recompute="blocks", compile="blocks")
    model(text=torch.randint(1, 30, (2, 16)))


@pytest.mark.parametrize("setting", ["recompute", "compile"])
def test_other_words_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} is 'some'; it is one of"):
        VATT(SMALL).set_execution(**{setting: "some"})
