"""The named cases: primary ones have the presets' sizes, parity ones cover what kernels get wrong.

Every one can be made.
"""

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vatt_fast.config import PRESETS, SHORT_NAMES, video_grid
from vatt_fast.kernels.cases import CASES, make, tag
from vatt_fast.kernels.drop_token import num_kept
from vatt_fast.kernels.ops import OPS

SHORT = {full: short for short, full in SHORT_NAMES.items()} | {"tiny": "tiny"}
ALL = [(op, name) for op, cases in CASES.items() for name in cases]
PRIMARY = [(op, name) for op, name in ALL if tag(CASES[op][name]) == "primary"]
DROP_RATES = (0.0, 0.25, 0.5, 0.75)


def configs(case):
    full = {short: name for name, short in SHORT.items()}
    return [PRESETS[full[short]] for short in case.origin.presets]


def num_patches(config, origin):
    if origin.modality == "audio":
        assert origin.pixels is None
        return config.num_audio_patches
    return math.prod(video_grid(config.frames, origin.pixels, origin.pixels, config.video_patch))


@pytest.mark.parametrize(("op", "name"), PRIMARY)
def test_primary_cases_are_the_presets_sizes(op, name):
    case = CASES[op][name]
    for config in configs(case):
        origin = case.origin
        if op == "contrastive_lse":
            assert case.dim == {"audio": config.d_va, "text": config.d_vt}[origin.modality]
            assert case.texts_per_clip == (
                config.texts_per_clip if origin.modality == "text" else 1
            )
            assert case.scale == pytest.approx(1 / config.temperature)
            continue
        tower = getattr(config, origin.modality)
        if op == "attention" and origin.modality == "text":
            assert (case.queries, case.keys) == (config.words + 1, config.words + 1)
            assert case.batch % config.texts_per_clip == 0
            assert (
                case.bias == (not config.agnostic)
                and max(case.num_keys) == case.keys
                and min(case.num_keys) == 1
            )
            assert case.scale == (None if config.agnostic else 1.0)
        else:
            patches = num_patches(config, origin)
            kept = num_kept(patches, origin.drop_rate)
            if op == "attention":
                assert (
                    case.keys == kept + 1
                    and case.queries in (1, kept + 1)
                    and case.scale is None
                    and not case.bias
                )
            elif op == "drop_token":
                assert (case.tokens, case.kept, case.dim) == (patches, kept, tower.dim)
            else:
                values = (
                    config.video_patch_values if origin.modality == "video" else config.audio_patch
                )
                assert (case.patches, case.kept or patches, case.values, case.dim) == (
                    patches,
                    kept,
                    values,
                    tower.dim,
                )
                raw = {"video": (torch.uint8, 2 / 255, -1.0), "audio": (torch.float32, 1.0, 0.0)}
                assert (case.patch_dtype, case.scale, case.shift) == raw[origin.modality]
        if op == "attention":
            assert (case.heads, case.head_dim) == (tower.num_heads, tower.head_dim)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_every_preset_has_its_cases_at_every_drop_rate(preset, modality):
    origins = {
        op: [c.origin for c in cases.values() if tag(c) == "primary"] for op, cases in CASES.items()
    }
    sides = {"audio": (None,), "video": (64,) if preset == "tiny" else (224, 320)}[modality]
    for op in ("attention", "drop_token", "patch_embed"):
        mine = {
            (o.drop_rate, o.pixels)
            for o in origins[op]
            if o.modality == modality and SHORT[preset] in o.presets
        }
        assert mine == {(rate, side) for rate in DROP_RATES for side in sides}, op
    assert any(o.modality == "text" and SHORT[preset] in o.presets for o in origins["attention"])
    assert {o.modality for o in origins["contrastive_lse"] if SHORT[preset] in o.presets} == {
        "audio",
        "text",
    }


@pytest.mark.parametrize(("op", "name"), PRIMARY)
def test_primary_cases_pass_their_ops_checks(op, name):
    """On fake CUDA tensors: nothing of the real sizes is allocated or computed."""
    case = CASES[op][name]
    with FakeTensorMode():
        inputs = make(dataclasses.replace(case, batch=min(case.batch, 32)), torch.bfloat16)
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor):
                inputs[key] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
        outputs = OPS[op].function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(output.device.type == "cuda" for output in outputs)
    if op == "attention":
        assert outputs[0].shape == inputs["q"].shape and outputs[1].shape == (
            inputs["q"].shape[0],
            case.heads,
            case.queries,
        )
        if case.packed:
            assert (
                inputs["q"].stride() == inputs["k"].stride()
                and inputs["q"].stride(1) == 3 * case.heads * case.head_dim
            )
    elif op == "patch_embed":
        assert outputs[0].shape == (
            inputs["patches"].shape[0],
            1 + (case.kept or case.patches),
            case.dim,
        )


@pytest.mark.parametrize("op", CASES)
def test_parity_cases_are_small_and_fresh(op):
    for name, case in CASES[op].items():
        assert case.name == name
        if tag(case) == "primary":
            continue
        first, again, other = make(case, seed=0), make(case, seed=0), make(case, seed=1)
        tensors = {key: value for key, value in first.items() if isinstance(value, torch.Tensor)}
        assert max(value.numel() for value in tensors.values()) < 100_000
        for key, value in tensors.items():
            assert torch.equal(value, again[key]), f"{name}.{key} is not repeatable"
            if key in OPS[op].differentiable and value.ndim:
                assert not torch.equal(value, other[key]), (
                    f"{name}.{key} does not depend on the seed"
                )
                assert (value != 0).float().mean() > 0.9, f"{name}.{key} holds zeros"


def test_parity_cases_cover_the_edges():
    attention_cases, nce, embed = (
        [c for c in CASES[op].values() if tag(c) == "parity"]
        for op in ("attention", "contrastive_lse", "patch_embed")
    )
    assert {1, 17, 37} <= {c.queries for c in attention_cases} and {8, 128} <= {
        c.head_dim for c in attention_cases
    }
    assert any(c.queries != c.keys for c in attention_cases) and any(
        c.packed for c in attention_cases
    )
    assert any(c.num_keys and 0 in c.num_keys and len(c.num_keys) > 1 for c in attention_cases)
    assert any(c.bias for c in attention_cases) and any(
        c.bias and c.num_keys for c in attention_cases
    )
    assert (
        any(c.texts_per_clip > 1 for c in nce)
        and any(c.first and c.batch < c.clips for c in nce)
        and any(c.bound for c in nce)
    )
    assert any(c.x_invalid for c in nce) and any(
        c.y_invalid and len(c.y_invalid) == c.clips * c.texts_per_clip for c in nce
    )
    assert {torch.uint8, torch.bfloat16, torch.float32} <= {c.patch_dtype for c in embed}
    assert any(c.clip and len(c.clip) == 4 for c in embed) and any(
        c.clip and len(c.clip) == 1 for c in embed
    )
    assert any(c.gathered for c in embed) and any(c.per == "clip" for c in embed)
    assert any(not c.position for c in embed) and any(not c.agg for c in embed)
    names = [(op, c.name) for op, cases in CASES.items() for c in cases.values()]
    assert len(set(names)) == len(names) == sum(len(cases) for cases in CASES.values())


def test_a_case_in_another_batch_and_dtype():
    case = dataclasses.replace(CASES["attention"]["text_tiny"], batch=7)
    inputs = make(case, torch.float16)
    assert (
        inputs["q"].shape == (7, 17, 4, 32)
        and inputs["q"].dtype == inputs["bias"].dtype == torch.float16
    )
    assert inputs["key_mask"].sum(1).tolist() == [17, 9, 4, 1, 12, 17, 9]
