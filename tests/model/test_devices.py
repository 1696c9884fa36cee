"""Two devices (real processes, gloo) equal one: statistics, loss and every gradient.

Invalid clips included.
"""

import dataclasses
import weakref

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import gloo_threads, in_processes
from torch.nn.parallel import DistributedDataParallel

from vatt_fast.collectives import process_group
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
FORMS = ("paper", "released", "symmetric")


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


def shares_of(rank: int, world: int):
    mine = slice(rank * CLIPS, (rank + 1) * CLIPS)
    return {form: step(mine, form) for form in FORMS}


def test_two_devices_equal_one():
    parts = in_processes(WORLD, shares_of)
    for form in FORMS:
        total, gradients, buffers = step(slice(None), form)
        shares = [part[form] for part in parts]
        torch.testing.assert_close(
            torch.stack([s[0] for s in shares]).mean(), total, rtol=1e-5, atol=1e-6
        )
        largest = max(g.abs().max() for g in gradients.values())
        for name, value in gradients.items():
            mean = torch.stack([s[1][name] for s in shares]).mean(
                0
            )  # what DistributedDataParallel hands the optimizer
            error = (mean - value).abs().max()
            assert error <= 1e-4 * value.abs().max() + 1e-6 * largest, (
                f"{form} {name}: {error:.1e} of {value.abs().max():.1e}"
            )
        for name, value in buffers.items():
            for share in shares:
                torch.testing.assert_close(share[2][name], value, rtol=1e-4, atol=1e-5)


def train_a_step(rank: int, world: int):
    """What a user's loop does; the group, weakly, and the threads it has."""
    model = DistributedDataParallel(VATT(CONFIG).train())
    optimizer = torch.optim.Adam(model.parameters())
    inputs, valid = batch()
    loss = vatt_loss(model(**inputs, **valid), CONFIG, scale=model.module.scale(), **valid)
    loss.total.backward()
    optimizer.step()
    return weakref.ref(dist.group.WORLD), gloo_threads()


def run_and_leave(rank: int, folder: str):
    where = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    with process_group("gloo", **where):
        group, threads = train_a_step(rank, WORLD)
        dist.barrier()
    assert threads, "this torch names gloo's threads otherwise: the next line would see none"
    assert not gloo_threads() and group() is None


def test_nothing_holds_a_process_group_that_is_destroyed(tmp_path):
    """Its threads would run into the interpreter's end, and abort the process now and then."""
    mp.spawn(run_and_leave, (str(tmp_path),), nprocs=WORLD)
