"""What `vatt-fast plan` computes, beside what torch and JAX take."""

import dataclasses
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vatt_fast.cli import main
from vatt_fast.config import PRESETS, VATTConfig
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT
from vatt_fast.plan import PlanConfig, activations, empty_batch, plan, state_bytes

SMALL = dataclasses.replace(PRESETS["tiny"], vocab_size=500)
AGNOSTIC = dataclasses.replace(SMALL, kind="modality_agnostic", text=SMALL.video)


def allocated(model: VATT, batch: dict, bf16: bool) -> tuple[int, int]:
    """Bytes that torch's allocator has given out after the forward pass, and at the peak."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    marks = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = vatt_loss(model(**batch), model.config, scale=model.scale())
        with torch.profiler.record_function("backward begins"):
            pass
        loss.total.backward()
    events = found.profiler.kineto_results.events()
    times = sorted((e.start_ns(), e.nbytes(), e.name()) for e in events)
    now = peak = 0
    for _, size, name in times:
        if name == "backward begins":
            marks.append(now)
        elif name == "[memory]":
            now += size
            peak = max(peak, now)
    return marks[0], peak


@pytest.mark.parametrize("recompute", ["none", "blocks", "ops"])
@pytest.mark.parametrize(
    ("config", "bf16"),
    [(SMALL, False), (SMALL, True), (AGNOSTIC, True)],
    ids=["fp32", "bf16", "agnostic"],
)
def test_activations_are_what_torch_allocates(config, bf16, recompute):
    model = VATT(config).train()
    model.set_execution(recompute=recompute)
    batch = empty_batch(config, 6, 0.5)
    for _ in range(2):  # the first time makes buffers that stay
        kept, peak = allocated(model, batch, bf16)
    planned = activations(config, 6, 0.5, recompute, bf16, gpu=False)
    assert planned["activations"] == pytest.approx(kept, rel=0.1)
    assert sum(planned.values()) == pytest.approx(peak, rel=0.1)


def test_a_step_is_what_jax_and_torch_take():
    """What JAX's ahead-of-time compiler counts for a CPU: the step's arguments, which are weights,
    Adam's state and the batch; and its temporaries, which are all else."""
    config, clips = SMALL, 8
    jax = pytest.importorskip("jax")
    from vatt_fast.on_jax import training

    mesh, shapes = training.make_mesh(jax.devices()[:1]), training.state_shapes(config)
    arrays = training.batch_shapes(config, clips, 0.5, 1)
    step = training.make_step(config, mesh, shapes, training.StepOptions())
    rate = jax.ShapeDtypeStruct((), "float32")
    lowered = step.lower(shapes, arrays, rate, jax.eval_shape(lambda: jax.random.key(0)))
    taken = lowered.compile().memory_analysis()
    ours = state_bytes(config, 1)
    what = PlanConfig(devices=(1,), batch=(clips,), words=500, precision="fp32")
    planned = plan(what, model_config=config)[0]["memory_gb"]
    batch = planned["batch"] * 1e9 / 3  # of three
    arguments = ours["weights"] + ours["adam"] + batch
    assert arguments == pytest.approx(taken.argument_size_in_bytes, rel=0.1)
    kinds = ("gradients", "activations", "backward", "loss")
    temporaries = 1e9 * sum(planned[kind] for kind in kinds)
    assert temporaries == pytest.approx(taken.temp_size_in_bytes, rel=0.1)
    model = VATT(config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert ours["adam"] == sum(4 * x.numel() for x in moments)


def test_shards_and_exchanges_follow_the_number_of_devices():
    def one(**changes) -> dict:
        return plan(PlanConfig(preset="tiny", batch=(64,), precision="fp32", **changes))[0]

    alone, replicas, shards = one(devices=(1,)), one(), one(strategy="fsdp2")
    assert not alone["exchanged_mb"]
    # a ring: all but a device's own part, out and back
    trained = sum(p.numel() for p in VATT(_with_words("tiny")).parameters() if p.requires_grad)
    sent = replicas["exchanged_mb"]["all-reduce of gradients"] * 1e6
    assert sent == pytest.approx(2 * 7 / 8 * 4 * trained)
    assert shards["memory_gb"]["adam"] == pytest.approx(replicas["memory_gb"]["adam"] / 8)
    assert sum(shards["exchanged_mb"].values()) > sum(replicas["exchanged_mb"].values())
    less = one(micro_batch=2)
    assert less["memory_gb"]["activations"] < replicas["memory_gb"]["activations"] / 3
    assert less["tflops"] == pytest.approx(replicas["tflops"] * 4 / 3)


def _with_words(name: str) -> VATTConfig:
    return dataclasses.replace(PRESETS[name], vocab_size=65536)


def test_the_command_prints_one_case_or_a_table(capsys):
    main(["plan", "--preset", "tiny", "--devices", "2", "--batch", "8", "--json"])
    (case,) = json.loads(capsys.readouterr().out)
    assert case["fits"] and case["decoding_cores"] == pytest.approx(case["clips_per_second"] / 10)
    main(["plan", "--preset", "tiny", "--devices", "1", "4", "--batch", "4", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [[" 1 ", " 4 "], [" 4 ", " 16 "]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(devices=(3,), batch=(8,)), "3 devices cannot share it evenly"),
        (dict(devices=(0,)), "devices is"),
        (dict(devices=(1, 2, 4), batch=(8, 8)), "give one batch for all"),
        (dict(drop_rate=1.0), "drop_rate is 1.0"),
        (dict(micro_batch=0), "micro_batch is 0"),
        (dict(clips_per_core=0.0), "clips_per_core is 0"),
        (dict(words=1), "words is 1"),
        (dict(preset="huge"), "unknown preset 'huge'"),
    ],
)
def test_what_cannot_be_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        plan(PlanConfig(**changes))
