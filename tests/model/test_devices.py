"""What processes exchange (gloo): how much, compiled too, and what they leave behind.

test_devices_exact.py has the steps of a model on many processes.
"""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import gloo_threads, in_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from vatt_fast import collectives, recompute
from vatt_fast.collectives import process_group
from vatt_fast.config import PRESETS
from vatt_fast.losses import contrastive_terms, global_mean, vatt_loss
from vatt_fast.model import VATT, BatchNorm
from vatt_fast.sharding import shard

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    frames=8,
    height=16,
    width=16,
    samples=1280,
    vocab_size=30,
    d_vt=32,
    texts_per_clip=2,
    learn_temperature=True,
)
WORLD, CLIPS = 2, 3  # of a process
TEXTS, D_VA, D_VT = CONFIG.texts_per_clip, CONFIG.d_va, CONFIG.d_vt


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return dict(
        video=torch.randint(0, 256, (CLIPS, 8, 16, 16, 3), dtype=torch.uint8, generator=draw),
        audio=torch.rand(CLIPS, 1280, generator=draw) * 2 - 1,
        text=torch.randint(0, 30, (CLIPS, TEXTS, 16), generator=draw),
    )


def loss_of(model: VATT, **options: Any) -> torch.Tensor:
    return vatt_loss(model(**batch()), CONFIG, scale=model.scale(), **options).total


# -- after the end ---------------------------------------------------------------------------------


def run_and_leave(rank: int, folder: str):
    where = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    with process_group("gloo", **where):
        group, threads = train_a_step()
        dist.barrier()
    assert threads, "this torch names gloo's threads otherwise: the next line would see none"
    assert not gloo_threads() and group() is None


def train_a_step():
    """What a user's loop does; the group, weakly, and the threads it has."""
    model = DistributedDataParallel(VATT(CONFIG).train())
    optimizer = torch.optim.Adam(model.parameters())
    vatt_loss(model(**batch()), CONFIG, scale=model.module.scale()).total.backward()
    optimizer.step()
    return weakref.ref(dist.group.WORLD), gloo_threads()


def test_nothing_holds_a_process_group_that_is_destroyed(tmp_path):
    """Its threads would run into the interpreter's end, and abort the process now and then."""
    mp.spawn(run_and_leave, (str(tmp_path),), nprocs=WORLD)


# -- exchanges -------------------------------------------------------------------------------------


class Exchanged(TorchDispatchMode):
    """Names of the collectives that run, and the bytes that each is given."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "_c10d_functional" and "wait" not in function.__name__:
            self.found.append((function.__name__.split(".")[0], args[0].nbytes))
        return function(*args, **(kwargs or {}))


def exchanged(rank: int, world: int):
    """Forward and backward of one step; the second time the number of clips is known."""
    model, found = VATT(CONFIG).train(), []
    for most_clips in (None, CLIPS):
        with Exchanged() as forward:
            loss = loss_of(model, most_clips=most_clips)
        with Exchanged() as backward:
            loss.backward()
        found.append((forward.found, backward.found))
    return found


def compiled(rank: int, world: int):
    """Value and gradients of batch norm and loss, eager and compiled in one graph."""
    found = []
    for compile in (lambda function: function, compile_whole):
        draw = torch.Generator().manual_seed(rank)
        x, y = torch.randn(2, CLIPS, 8, generator=draw, dtype=torch.float64).unbind()
        norm = BatchNorm(8, momentum=0.1, eps=1e-3).double()
        scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
        x.requires_grad_()

        def loss(x, y, norm=norm, scale=scale):
            terms = contrastive_terms(norm(x), y, scale=scale, most_clips=CLIPS)
            return global_mean(*terms)

        value = compile(loss)(x, y)
        value.backward()
        found.append([value.detach(), x.grad, scale.grad, norm.weight.grad, norm.running_var])
    return found


def compile_whole(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def mistakes(rank: int, world: int) -> list[str]:
    """What is said where processes hold different numbers of texts, and elsewhere."""
    said = []
    x = torch.randn(CLIPS, 8)
    texts = torch.randn(CLIPS, 1 + rank, 8)
    for call in (
        lambda: contrastive_terms(x, texts, scale=1.0),
        lambda: contrastive_terms(x, x, scale=1.0, most_clips=CLIPS - 1),
        lambda: global_mean(x[:, 0], x[:, 0] > 0, reduction="median"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    return said


def far_from_zero(rank: int, world: int):
    """Batch norm's statistics of rows whose mean is 1000 times their deviation."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(world * 64, 4, generator=draw, dtype=torch.float64) + 1e3
    norm = BatchNorm(4, momentum=1.0, eps=1e-3)
    norm(x[rank * 64 : (rank + 1) * 64].float())
    return norm.running_var, x.float().double().var(0, correction=0)


def in_bf16(rank: int, world: int) -> dict[str, Any]:
    """A sharded model that computes in bf16: dtypes, and its loss beside that in fp32."""
    torch.manual_seed(0)
    whole = VATT(CONFIG).train()
    expected = loss_of(whole).detach()
    torch.manual_seed(0)
    model = VATT(CONFIG).train()
    seen = {}
    norm = model.common_space.video_va_norm
    norm.register_forward_hook(
        lambda m, args, out: seen.update(weight=m.weight.dtype, out=out.dtype)
    )
    block = model.video_encoder.blocks[0]
    block.register_forward_hook(lambda m, args, out: seen.update(block=m.qkv.weight.dtype))
    shard(model, param_dtype=torch.bfloat16)
    loss = loss_of(model)
    loss.backward()
    grad = model.log_scale.grad
    return dict(
        **seen,
        scale=model.scale().dtype,
        scale_shape=grad.shape,
        scale_gradient=grad.full_tensor(),
        loss=loss.detach(),
        expected=expected,
        running=norm.running_mean.dtype,
    )


def all_together(rank: int, world: int) -> dict[str, Any]:
    """Gradients of a model that is compiled, computed again and sharded, beside a plain one's."""
    recompute._BACKEND = "aot_eager"
    found: dict[str, Any] = {}
    for name in ("plain", "all"):
        torch.manual_seed(0)
        model = VATT(CONFIG).train()
        if name == "all":
            model.set_execution(recompute="ops", compile="blocks")
            shard(model)
        loss_of(model).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        if name == "all":
            found[name] = {n: g.full_tensor() for n, g in gradients.items()}
        else:
            found[name] = {n: collectives.total(g) / world for n, g in gradients.items()}
    return found


def pair_of_processes(rank: int, world: int) -> dict[str, Any]:
    parts = (exchanged, compiled, mistakes, far_from_zero, in_bf16, all_together)
    return {part.__name__: part(rank, world) for part in parts}


@pytest.fixture(scope="module")
def pair():
    return in_processes(WORLD, pair_of_processes, dtensors=True)


def test_a_step_exchanges_what_the_page_says(pair):
    """docs/devices.md has these numbers as a formula."""
    norms = [2 * width + 2 for width in (D_VA, D_VA, D_VT, D_VA, D_VT)]
    pairs = ((1, D_VA), (TEXTS, D_VT))
    counts = [("all_gather_into_tensor", 24)] * 2
    forward = [("all_gather_into_tensor", 4 * n) for n in norms]
    backward = [("reduce_scatter_tensor", 4 * n * WORLD) for n in norms]
    for texts, width in pairs:
        own = CLIPS * texts
        forward += [
            ("all_gather_into_tensor", 4 * own * width),
            ("all_gather_into_tensor", own),  # which are valid
            ("all_to_all_single", 4 * own * WORLD),
            ("all_reduce", 4),
        ]
        backward += [
            ("reduce_scatter_tensor", 4 * own * width * WORLD),
            ("all_to_all_single", 4 * own * WORLD),
        ]
    for part in pair:
        asking, known = part["exchanged"]
        assert sorted(asking[0]) == sorted(forward + counts)
        assert sorted(known[0]) == sorted(forward)
        assert sorted(asking[1]) == sorted(known[1]) == sorted(backward)


def test_exchanges_compile_in_one_graph(pair):
    for part in pair:
        eager, graph = part["compiled"]
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_compared_is_refused_on_every_process(pair):
    for part in pair:
        texts, most, reduction = part["mistakes"]
        assert "by rank: (3, 1, 8), (3, 2, 8)" in texts and "mark them invalid" in texts
        assert most == "most_clips is 2, and this process holds 3 clips"
        assert reduction == "reduction is 'median'; it is one of mean, sum"


def test_statistics_do_not_cancel(pair):
    for part in pair:
        found, expected = part["far_from_zero"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
        assert torch.equal(found, pair[0]["far_from_zero"][0])


def test_bf16_weights_leave_norms_temperature_and_loss_in_fp32(pair):
    for part in pair:
        found = part["in_bf16"]
        assert found["block"] == torch.bfloat16
        for name in ("weight", "out", "scale", "running"):
            assert found[name] == torch.float32, name
        assert found["loss"].dtype == torch.float32 and found["scale_shape"] == ()
        assert torch.equal(found["scale_gradient"], pair[0]["in_bf16"]["scale_gradient"])
        # of a few clips; plain autocast is up to 14 % off, by seed
        torch.testing.assert_close(found["loss"], found["expected"], rtol=0.25, atol=0)


def test_a_compiled_checkpointed_sharded_model_has_the_same_gradients(pair):
    for part in pair:
        plain, found = part["all_together"]["plain"], part["all_together"]["all"]
        largest = max(g.abs().max() for g in plain.values())
        assert plain.keys() == found.keys()
        for name, g in plain.items():
            torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_one_process_exchanges_nothing():
    x = torch.randn(2, 3)
    assert collectives.world_size() == 1 and collectives.rank() == 0
    assert torch.equal(collectives.gather(x), x[None])
    assert collectives.total(x) is x and collectives.exchange(x) is x
    assert collectives.of_all((1, 2), x.device) == [[1, 2]]
