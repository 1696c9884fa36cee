"""Gradient caching: a batch in micro-batches has the loss and gradients of the whole batch."""

import dataclasses
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from processes import in_processes
from torch.nn.parallel import DistributedDataParallel

from vatt_fast.config import PRESETS
from vatt_fast.large_batch import backward_in_micro_batches
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT, VATTOutput
from vatt_fast.sharding import shard

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    frames=8,
    height=16,
    width=16,
    samples=1280,
    vocab_size=30,
    texts_per_clip=2,
    learn_temperature=True,
)
CLIPS = 8


def new_model(config=CONFIG) -> VATT:
    torch.manual_seed(0)
    return VATT(config).double().train()


def batch(
    model: VATT, per: str, rows: slice = slice(None)
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``forward``'s arguments, and those of them that the loss takes too."""
    draw = torch.Generator().manual_seed(3)
    keeps: dict[str, Any] = model.sample_keep(0.5, seed=0, step=0, per=per, batch=CLIPS)
    inputs = dict(
        video=torch.randint(0, 256, (CLIPS, 8, 16, 16, 3), dtype=torch.uint8, generator=draw),
        audio=torch.rand(CLIPS, 1280, generator=draw).double() * 2 - 1,
        text=torch.randint(0, 30, (CLIPS, 2, 16), generator=draw),
    )
    valid = dict(
        video_valid=torch.tensor([1, 1, 0, 1, 1, 1, 1, 1]).bool(),
        audio_valid=torch.tensor([1, 0, 1, 1, 1, 0, 1, 1]).bool(),
        text_valid=torch.rand(CLIPS, 2, generator=draw) < 0.7,
    )
    if per == "clip":
        keeps = {name: x[rows] for name, x in keeps.items()}
    inputs, valid = ({n: x[rows] for n, x in part.items()} for part in (inputs, valid))
    return {**inputs, **keeps, **valid}, valid


def gradients(model: VATT) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    return {**whole, **dict(model.named_buffers())}


def in_micro_batches(micro: int, per: str = "batch", rows: slice = slice(None), wrap=lambda m: m):
    model = new_model()
    wrapped = wrap(model)
    inputs, valid = batch(model, per, rows)
    loss = backward_in_micro_batches(
        wrapped,
        inputs,
        lambda output: vatt_loss(output, CONFIG, scale=model.scale(), **valid),
        micro,
    )
    return loss.total, gradients(model)


def at_once(per: str = "batch"):
    model = new_model()
    inputs, valid = batch(model, per)
    loss = vatt_loss(model(**inputs), CONFIG, scale=model.scale(), **valid).total
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("per", ["batch", "clip"])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_are_the_whole_batch(micro, per):
    assert_same(in_micro_batches(micro, per), at_once(per))


def test_dropout_is_drawn_alike_both_times():
    config = dataclasses.replace(CONFIG, dropout=0.2)
    model = new_model(config)
    inputs, valid = batch(model, "clip")

    def loss_of(output):
        return vatt_loss(output, config, scale=model.scale(), **valid)

    torch.manual_seed(5)
    loss = backward_in_micro_batches(model, inputs, loss_of, 4).total
    after, found = torch.rand(1), (loss, gradients(model))
    # the same draws with one graph through all micro-batches
    model = new_model(config)
    torch.manual_seed(5)
    parts = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = {n: x[rows] for n, x in inputs.items() if n not in valid}
        parts.append(model(**part, heads=False))
    assert after == torch.rand(1)
    names = ("video_pooled", "audio_pooled", "text_pooled")
    pooled = VATTOutput(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})
    loss = loss_of(model(pooled=pooled, **valid)).total
    loss.backward()
    assert_same(found, (loss.detach(), gradients(model)))


def test_a_micro_batch_takes_less_memory():
    model = new_model()
    inputs = {
        "video": torch.randint(0, 256, (CLIPS, 16, 64, 64, 3), dtype=torch.uint8),
        "audio": torch.rand(CLIPS, 1280).double(),
    }
    peaks = []
    for micro in (1, CLIPS):
        model.zero_grad()
        with LiveBytes() as live:
            backward_in_micro_batches(model, inputs, lambda out: vatt_loss(out, CONFIG), micro)
        peaks.append(live.peak)
    assert peaks[0] < 0.4 * peaks[1], peaks  # gradients stay, activations are an eighth


def test_gradients_are_added():
    model = new_model()
    inputs, valid = batch(model, "batch")

    def backward():
        return backward_in_micro_batches(
            model, inputs, lambda out: vatt_loss(out, CONFIG, scale=model.scale(), **valid), 4
        )

    backward()
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], rtol=1e-10, atol=1e-10, msg=name)


def test_refusals():
    with pytest.raises(ValueError, match="micro_batch is 0"):
        backward_in_micro_batches(new_model(), {}, lambda output: output, 0)
    with pytest.raises(ValueError):
        backward_in_micro_batches(new_model(), {}, lambda output: output, 2)


def share(rank: int, world: int):
    rows = slice(rank * CLIPS // world, (rank + 1) * CLIPS // world)
    return {
        "ddp": in_micro_batches(3, "clip", rows, DistributedDataParallel),
        "fsdp": in_micro_batches(3, "clip", rows, shard),
    }


def test_two_processes_in_micro_batches_are_one_at_once():
    shares = in_processes(2, share, dtensors=True)
    expected = at_once("clip")
    for how in ("ddp", "fsdp"):
        for each in shares:
            loss = torch.stack([other[how][0] for other in shares]).mean()
            assert_same((loss, each[how][1]), expected)
