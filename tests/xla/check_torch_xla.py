"""torch_xla on its CPU device: every op through the adapter against the reference, a training step.

Kernels are interpreted. Then the same calls are lowered for a TPU and compiled by the libtpu that
torch_xla brings. See run.sh.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import jax
import pytest
import torch
import torch_xla
import torch_xla.core.xla_builder as xla_builder
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import adapter_calls
from op_battery import DTYPES

from vatt_fast.config import PRESETS, TowerConfig
from vatt_fast.kernels import attention, explain, use_backend, xla
from vatt_fast.kernels.cases import CASES, make
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.parity import assert_as_good_as_plain, cancelled_rows, expected, run
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT

DEVICE = torch_xla.device()
NAMES = {
    "attention": ("ragged_37_by_70", "packed", "text", "keyless_bias"),
    "drop_token": ("ragged", "ragged_per_clip"),
    "contrastive_lse": ("shard", "shard_masked", "texts_bounded"),
    "patch_embed": (
        "kept_rows",
        "kept_per_clip",
        "gathered_per_clip",
        "odd_clip",
        "float_clip",
        "waveform",
        "only_projected",
    ),
}
TOWER = TowerConfig(
    depth=2, dim=64, mlp_dim=128, num_heads=2
)  # a whole block, and the last one for AGG alone
MODEL = dataclasses.replace(
    PRESETS["tiny"],
    video=TOWER,
    audio=TOWER,
    text=TOWER,
    frames=4,
    height=16,
    width=16,
    samples=1280,
    vocab_size=30,
    texts_per_clip=2,
)


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "verdict"), [("CPU", "runs when asked for"), ("TPU", "preferred (fwd, bwd)")]
)
@pytest.mark.parametrize("op", OPS)
def test_the_kernels_are_preferred_on_a_tpu(op, runtime, verdict, monkeypatch):
    monkeypatch.setattr(torch_xla.runtime, "device_type", lambda: runtime)
    case = (
        "video_tiny_drop50" if op == "attention" else NAMES[op][0]
    )  # attention's want queries enough
    inputs = list(make(CASES[op][case], device=DEVICE).items())
    count = len(OPS[op].tensors)
    verdicts = explain(op, *[value for _, value in inputs[:count]], **dict(inputs[count:]))
    assert verdicts["pallas_tpu"] == verdict


def test_what_the_kernels_do_not_take_is_said():
    q = torch.zeros(1, 4, 2, 16, device=DEVICE)
    with use_backend(attention="pallas_tpu"):
        with pytest.raises(ValueError, match="float64 is for the reference"):
            attention(q.double(), q.double(), q.double(), scale=1.0)
        with pytest.raises(ValueError, match="head_dim 12 is not a multiple of 8"):
            attention(q[..., :12], q[..., :12], q[..., :12], scale=1.0)
        with pytest.raises(
            ValueError, match="tensors are on cpu; from torch its kernels are reached on xla"
        ):
            attention(q.cpu(), q.cpu(), q.cpu(), scale=1.0)
        with pytest.raises(
            ValueError, match="q is on xla:0, k is on cpu, v is on cpu; move them to one device"
        ):
            attention(q, q.cpu(), q.cpu(), scale=1.0)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in NAMES.items() for name in names]
)
def test_gradients(op, name, dtype):
    judged(op, name, DTYPES[dtype])


def test_gradients_without_one_of_lse():
    judged("attention", "text", torch.float32, without=("lse",))


def test_autocast_reaches_the_kernels():
    inputs = make(CASES["attention"]["text"], device=DEVICE)
    with use_backend(attention="pallas_tpu"):
        with torch.autocast("xla", torch.bfloat16):
            out, lse = attention(**inputs)
        halves = {name: inputs[name].bfloat16() for name in "qkv"}
        expected, expected_lse = attention(**inputs | halves)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out.cpu(), expected.cpu()) and torch.equal(lse.cpu(), expected_lse.cpu())


def judged(op, name, dtype, without=()):
    case = CASES[op][name]
    inputs = make(case, dtype)
    yardstick, truth = expected(op, inputs, dtype, without=without)
    with use_backend(**{op: "pallas_tpu"}):
        there = make(case, dtype, DEVICE)
        result = run(OPS[op].function, op, there, dtype=dtype, without=without)
    result = {name: value.cpu() for name, value in result.items()}
    slack = 2.0 if dtype == torch.float32 else 0.5  # XLA adds one by one on a CPU, torch in a tree
    assert_as_good_as_plain(
        result, yardstick, truth, dtype, cancelled_rows(op, inputs), slack_eps=slack
    )


def test_a_repeated_call_is_traced_once():
    inputs = make(CASES["drop_token"]["one_kept"], device=DEVICE)
    with use_backend(drop_token="pallas_tpu"):
        run(OPS["drop_token"].function, "drop_token", inputs)
        before = xla.computation.cache_info()
        run(OPS["drop_token"].function, "drop_token", inputs)
    after = xla.computation.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 2)


def test_training_steps():
    """Forward, both losses, backward and Adam, twice: losses and weights are those of the CPU.

    With the same draw of DropToken.
    """
    torch.manual_seed(0)
    here = VATT(MODEL).train()
    there = copy.deepcopy(here).to(DEVICE)
    inputs = (
        torch.randint(0, 256, (4, 4, 16, 16, 3), dtype=torch.uint8),
        torch.rand(4, 1280) * 2 - 1,
        torch.randint(1, 30, (4, 2, MODEL.words)),
    )
    losses, started = [], copy.deepcopy(here.state_dict())
    for model, device, backend in ((here, "cpu", "reference"), (there, DEVICE, "pallas_tpu")):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
        for step in range(2):
            keep = model.sample_keep(0.5, seed=0, step=step)
            keep = {name: torch.as_tensor(value).to(device) for name, value in keep.items()}
            with use_backend(backend):
                loss = vatt_loss(
                    model(*(x.to(device) for x in inputs), **keep), MODEL, scale=model.scale()
                ).total
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            torch_xla.sync()
            losses.append(loss.item())
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-4, atol=1e-5)
    assert losses[1] != losses[0] and any(
        not torch.equal(value, started[name]) for name, value in here.state_dict().items()
    )
    for (name, wanted), value in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(
            value.detach().cpu(),
            wanted.detach(),
            rtol=1e-2,
            atol=2e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# -- for a TPU -------------------------------------------------------------------------------------

CALLS = [(op, function) for op in OPS for function in ("forward", "backward")]
KERNELS = {("contrastive_lse", "backward"): 2, ("patch_embed", "backward"): 2}  # the others are one


@pytest.mark.parametrize(("op", "function"), CALLS)
def test_a_computation_for_a_tpu_holds_the_kernels(op, function, monkeypatch):
    """What torch_xla would place into its graph on a TPU: built, not run."""
    kept = []
    monkeypatch.setattr(
        xla_builder,
        "computation_from_module_proto",
        lambda name, module: kept.append((name, module)) or "computation",
    )
    call = adapter_calls.call_of(op, function, torch.bfloat16)
    xla.computation.__wrapped__(call, "tpu")
    monkeypatch.undo()
    [(name, module)] = kept
    built = xla_builder.computation_from_module_proto(name, module)
    assert name == f"vatt_{op}_{function}"
    assert xla_builder.get_computation_hlo(built).count(
        'custom_call_target="tpu_custom_call"'
    ) == KERNELS.get((op, function), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("op", "function"), CALLS)
def test_the_pinned_libtpu_compiles_the_kernels(op, function, dtype):
    """For a v5e. What it is given is what torch_xla would give it."""
    call = adapter_calls.call_of(op, function, dtype)
    chip = SingleDeviceSharding(
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    )
    there = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip) for x in call.specs]
    compiled = jax.jit(xla.exported(call, "tpu").call).lower(*there).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == KERNELS.get(
        (op, function), 1
    )
