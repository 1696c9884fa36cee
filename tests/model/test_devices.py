"""Two devices (real processes, gloo) equal one: statistics, loss and every gradient.

Invalid clips included.
"""

import dataclasses

import torch
import torch.multiprocessing as mp

from vatt_fast.config import PRESETS
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT

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
WORLD, CLIPS = 2, 3  # a device


def batch():
    torch.manual_seed(7)
    total = WORLD * CLIPS
    inputs = dict(
        video=torch.randint(0, 256, (total, 8, 16, 16, 3), dtype=torch.uint8),
        audio=torch.rand(total, 1280) * 2 - 1,
        text=torch.randint(0, 30, (total, 2, 16)),
    )
    # lopsided on purpose: per-device means would be wrong
    valid = dict(
        video_valid=torch.tensor([1, 1, 1, 0, 1, 1]).bool(),
        audio_valid=torch.tensor([1, 0, 1, 1, 1, 1]).bool(),
        text_valid=torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1], [1, 1], [0, 1]]).bool(),
    )
    return inputs, valid


def step(rows: slice, form: str):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, nce_form=form)
    model = VATT(config).train()
    inputs, valid = ({name: value[rows] for name, value in part.items()} for part in batch())
    loss = vatt_loss(model(**inputs, **valid), config, scale=model.scale(), **valid)
    loss.total.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return loss.total.detach().double(), gradients, dict(model.named_buffers())


def _process(rank: int, rendezvous: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD
    )
    for form in ("paper", "released", "symmetric"):
        total, gradients, buffers = step(slice(rank * CLIPS, (rank + 1) * CLIPS), form)
        plain = {name: value.numpy() for name, value in (gradients | buffers).items()}
        results[form, rank] = (total.item(), plain)
    torch.distributed.destroy_process_group()


def test_two_devices_equal_one(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_process, (str(tmp_path / "rendezvous"), results), nprocs=WORLD)
        parts = dict(results)
    for form in ("paper", "released", "symmetric"):
        total, gradients, buffers = step(slice(None), form)
        shares = [parts[form, rank] for rank in range(WORLD)]
        torch.testing.assert_close(
            torch.tensor([s[0] for s in shares]).double().mean(), total, rtol=1e-5, atol=1e-6
        )
        largest = max(g.abs().max() for g in gradients.values())
        for name, value in gradients.items():
            mean = torch.stack([torch.as_tensor(s[1][name]) for s in shares]).mean(
                0
            )  # what DistributedDataParallel hands the optimizer
            error = (mean - value).abs().max()
            assert error <= 1e-4 * value.abs().max() + 1e-6 * largest, (
                f"{form} {name}: {error:.1e} of {value.abs().max():.1e}"
            )
        for name, value in buffers.items():
            for share in shares:
                torch.testing.assert_close(
                    torch.as_tensor(share[1][name]), value, rtol=1e-4, atol=1e-5
                )
