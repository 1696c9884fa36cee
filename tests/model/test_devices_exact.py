"""Three optimizer steps on one, two and four processes (gloo) are the same steps.

Losses, every weight and batch norm's statistics: under DistributedDataParallel and FSDP2.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from vatt_fast.config import PRESETS
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT
from vatt_fast.sharding import shard

TINY = dataclasses.replace(
    PRESETS["tiny"],
    frames=8,
    height=16,
    width=16,
    samples=1280,
    vocab_size=30,
    texts_per_clip=2,
    learn_temperature=True,
)
AGNOSTIC = dict(kind="modality_agnostic", text=TINY.video)
CLIPS, STEPS = 8, 3
WORLDS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrap: str = "ddp"
    dtype: torch.dtype = torch.float64
    masks: bool = True
    # clips of each process, by the number of processes; evenly where nothing is said
    held: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    reduction: str = "mean"
    per: str = "batch"  # DropToken
    members: tuple[int, ...] | None = None  # ranks of the group that trains; None: all
    execution: dict[str, str] = dataclasses.field(default_factory=dict)


CASES = {
    "paper": Case(dict(nce_form="paper")),
    "released": Case(dict(nce_form="released", heads="released")),
    "symmetric": Case(dict(nce_form="symmetric"), masks=False),
    "five_texts": Case(dict(texts_per_clip=5)),
    "agnostic": Case(AGNOSTIC),
    "fixed_temperature": Case(dict(learn_temperature=False)),
    "drop_per_clip": Case(per="clip"),
    "sums": Case(reduction="sum"),
    "fp32": Case(dtype=torch.float32),
    "uneven": Case(held={2: (3, 5), 4: (1, 4, 2, 1)}),
    "all_invalid_on_a_rank": Case(held={2: (1, 7), 4: (1, 3, 2, 2)}),
    "own_group": Case(members=(1, 3)),
    "fsdp": Case(wrap="fsdp", execution=dict(recompute="ops")),
    "fsdp_fp32": Case(dict(learn_temperature=False), wrap="fsdp", dtype=torch.float32),
    "fsdp_agnostic": Case(AGNOSTIC, wrap="fsdp"),
    "fsdp_uneven": Case(wrap="fsdp", held={2: (3, 5), 4: (1, 4, 2, 1)}),
    "fsdp_own_group": Case(wrap="fsdp", members=(1, 3)),
}


def batch(case: Case, config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole batch; the first clip has nothing valid, and no part is valid everywhere."""
    draw = torch.Generator().manual_seed(7)
    texts = config.texts_per_clip
    inputs = dict(
        video=torch.randint(0, 256, (CLIPS, 8, 16, 16, 3), dtype=torch.uint8, generator=draw),
        audio=(torch.rand(CLIPS, 1280, generator=draw) * 2 - 1).to(case.dtype),
        text=torch.randint(0, 30, (CLIPS, texts, 16), generator=draw),
    )
    if not case.masks:
        return inputs, {}
    text_valid = torch.rand(CLIPS, texts, generator=draw) < 0.6
    text_valid[0] = False
    return inputs, dict(
        video_valid=torch.tensor([0, 1, 1, 1, 0, 1, 1, 1]).bool(),
        audio_valid=torch.tensor([0, 1, 0, 1, 1, 1, 1, 1]).bool(),
        text_valid=text_valid,
    )


def rows_of(case: Case, rank: int, world: int) -> slice:
    held = case.held.get(world, (CLIPS // world,) * world)
    return slice(sum(held[:rank]), sum(held[: rank + 1]))


def train(case: Case, rank: int = 0, world: int = 1, group=None) -> dict[str, Any]:
    """Losses of the steps, and the state dict after the last."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **case.config)
    model = VATT(config).to(case.dtype).train()
    model.set_execution(**case.execution)
    wrapped: Any = model
    if world > 1 and case.wrap == "fsdp":
        mesh = None if group is None else DeviceMesh.from_group(group, "cpu")
        wrapped = shard(model, mesh)
    elif world > 1:
        wrapped = DistributedDataParallel(model, process_group=group, broadcast_buffers=False)
    # gradients that are 0 but for rounding must not become whole steps of Adam
    if case.dtype == torch.float64:
        optimizer: Any = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-5)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    mine = rows_of(case, rank, world)
    inputs, valid = ({n: x[mine] for n, x in part.items()} for part in batch(case, config))
    losses = []
    for step in range(STEPS):
        keeps = model.sample_keep(0.5, seed=0, step=step, per=case.per, batch=CLIPS)
        if case.per == "clip":
            keeps = {name: keep[mine] for name, keep in keeps.items()}
        optimizer.zero_grad()
        output = wrapped(**inputs, **keeps, **valid, group=group)
        loss = vatt_loss(
            output, config, scale=model.scale(), **valid, group=group, reduction=case.reduction
        ).total
        loss.backward()
        if case.reduction == "sum":  # DDP has averaged
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(world)
        optimizer.step()
        model.clamp_temperature()
        losses.append(loss.detach())
    state = {n: getattr(x, "full_tensor", lambda x=x: x)() for n, x in model.state_dict().items()}
    return {"losses": torch.stack(losses), **{n: x.clone() for n, x in state.items()}}


def train_all(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        if case.members is None:
            found[name] = train(case, rank, world)
        elif world > max(case.members):
            group = dist.new_group(case.members)
            if rank in case.members:
                found[name] = train(case, dist.get_rank(group), len(case.members), group)
            del group
    return found


@pytest.fixture(scope="module")
def found():
    return {world: in_processes(world, train_all, dtensors=True) for world in WORLDS}


@pytest.mark.parametrize("name", CASES)
def test_steps_on_many_processes_are_those_on_one(name, found):
    case, compared = CASES[name], 0
    one = train(case)
    assert not torch.equal(one["common_space.video_va_norm.running_mean"], torch.zeros(1))
    close = (
        dict(rtol=1e-10, atol=1e-10) if case.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    )
    for world in WORLDS:
        shares = [part[name] for part in found[world] if name in part]
        if not shares:
            continue
        compared += 1
        losses = torch.stack([share.pop("losses") for share in shares])
        loss = losses.sum(0) if case.reduction == "sum" else losses.mean(0)
        torch.testing.assert_close(loss, one["losses"], **close)
        for rank, share in enumerate(shares):
            assert share.keys() == one.keys() - {"losses"}
            for key, value in share.items():
                where = f"rank {rank} of {world}: {key}: "
                torch.testing.assert_close(value, one[key], **close, msg=where.__add__)
    assert compared
