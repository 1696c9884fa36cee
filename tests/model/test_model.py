"""What the model does beside exactness: subsets, masks, DropToken, sizes, saving, errors."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vatt_fast as vf
from vatt_fast import losses as losses_module
from vatt_fast import model as model_module
from vatt_fast.config import PRESETS, VATTConfig, preset
from vatt_fast.kernels import patch_embed, patchify, use_backend
from vatt_fast.losses import contrastive_terms, global_mean, vatt_loss
from vatt_fast.model import VATT, BatchNorm, create_model
from vatt_fast.weights import load_tensors

SMALL = dataclasses.replace(
    PRESETS["tiny"], frames=8, height=32, width=40, samples=2560, vocab_size=30, texts_per_clip=2
)
TRUNK = dataclasses.replace(SMALL, kind="modality_agnostic", text=SMALL.video, post_proj_dim=48)
CONFIGS = {
    "specific": SMALL,
    "agnostic": TRUNK,
    "specific_released": SMALL.with_recipe("released"),
    "agnostic_released": TRUNK.with_recipe("released"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return VATT(CONFIGS[request.param]).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return dict(
        video=torch.randint(0, 256, (3, 8, 32, 40, 3), dtype=torch.uint8),
        audio=torch.rand(3, 2560) * 2 - 1,
        text=torch.randint(0, 30, (3, 2, 16)),
    )


def same(a, b, names=None, **tolerance):
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if left is not None and right is not None and (names is None or field.name in names):
            torch.testing.assert_close(
                left,
                right,
                msg=lambda text, name=field.name: f"{name}: {text}",
                **(tolerance or dict(rtol=1e-4, atol=1e-5)),
            )


def test_any_subset_of_modalities(model, inputs):
    whole = model(**inputs)
    for subset in (["video"], ["audio"], ["text"], ["video", "text"], ["video", "audio"]):
        part = model(**{name: inputs[name] for name in subset})
        same(part, whole)
        assert {name for name in inputs if getattr(part, f"{name}_pooled") is not None} == set(
            subset
        )
    assert whole.z_text_vt.shape == (3, 2, 64)


def test_the_last_block_for_agg_alone_is_exact(model, inputs):
    pooled, full = model(**inputs), model(**inputs, features=True)
    assert pooled.video_features is None and full.video_features.shape[1] == 1 + 2 * 4 * 5
    same(pooled, full)


@pytest.mark.parametrize("per", ["batch", "clip"])
def test_drop_token_takes_the_tokens_away(model, inputs, per):
    """Dropped patches may hold anything; rows gathered beforehand give the same."""
    keep = model.sample_keep(0.5, seed=1, step=2, per=per, batch=3)
    out = model(**inputs, **keep)
    assert keep["video_keep"].shape[-1] == 20 and keep["audio_keep"].shape[-1] == 10
    rows = {
        "video": patchify(inputs["video"], (4, 8, 8)),
        "audio": patchify(inputs["audio"], (128,)),
    }
    spoilt, gathered = {}, {}
    for name, value in rows.items():
        index = keep[f"{name}_keep"].long().expand(3, -1)[..., None].expand(-1, -1, value.shape[-1])
        gathered[name] = value.gather(1, index)
        spoilt[name] = torch.full_like(value, 77).scatter(1, index, gathered[name])
    for version in (spoilt, gathered):
        same(model(version["video"], version["audio"], **keep), out)
    if per == "clip":
        assert (keep["video_keep"][0] != keep["video_keep"][1]).any()


def test_clips_are_read_in_place(model, inputs, monkeypatch):
    """The op gets the clip itself, with the patch's sizes, and cuts nothing out beforehand."""
    seen = []

    def looking(patches, *args, **options):
        seen.append((patches.data_ptr(), tuple(patches.shape), options["patch"]))
        return patch_embed(patches, *args, **options)

    monkeypatch.setattr(model_module, "patch_embed", looking)
    model(**inputs, **model.sample_keep(0.5, seed=0, step=0))
    expected = [("video", (4, 8, 8)), ("audio", (128,))]
    assert seen == [
        (inputs[name].data_ptr(), tuple(inputs[name].shape), patch) for name, patch in expected
    ]


def test_frames_have_the_gradients_of_their_rows(model):
    """Odd float frames too, which are padded with black."""
    torch.manual_seed(3)
    frames = (torch.rand(2, 7, 27, 44, 3) * 2 - 1).requires_grad_()
    rows = patchify(frames, (4, 8, 8), pad_value=-1)
    grads = [
        torch.autograd.grad(out.video_pooled.square().sum(), frames)[0]
        for out in (model(video=frames), model(video=rows, video_grid=(2, 4, 6)))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_drop_rate_zero_changes_nothing(model, inputs):
    same(model(**inputs, **model.sample_keep(0.0, seed=0, step=0)), model(**inputs))


@pytest.mark.parametrize("as_rows", [False, True])
def test_drop_token_of_another_size_is_drawn_for_it(model, as_rows):
    """Half of what the clips at hand have, not of what the config's have."""
    frames = torch.randint(0, 256, (2, 7, 27, 44, 3), dtype=torch.uint8)
    clips: dict = {"video": frames, "audio": torch.rand(2, 1300)}
    if as_rows:
        clips = {"video": patchify(frames, (4, 8, 8)), "audio": patchify(clips["audio"], (128,))}
        clips["video_grid"] = (2, 4, 6)
    keep = model.sample_keep(0.5, seed=0, step=0, **clips)
    assert {name: len(value) for name, value in keep.items()} == {
        "video_keep": 24,  # of 2 x 4 x 6
        "audio_keep": 5,  # of 11
    }
    out = model(**clips, **keep, features=True)
    assert out.video_features.shape[1] == 25 and out.audio_features.shape[1] == 6
    only_grid = model.sample_keep(0.5, seed=0, step=0, video_grid=(2, 4, 6))
    assert torch.equal(only_grid["video_keep"], keep["video_keep"])
    with pytest.raises(ValueError, match="indices"):
        model(**clips, **model.sample_keep(0.5, seed=0, step=0))


def test_other_sizes_odd_clips_and_images(model):
    torch.manual_seed(2)
    odd = torch.randint(0, 256, (2, 7, 27, 50, 3), dtype=torch.uint8)
    padded = torch.zeros(2, 8, 32, 56, 3, dtype=torch.uint8)
    padded[:, :7, :27, :50] = odd
    same(model(video=odd), model(video=padded))
    as_float = odd.float() / 127.5 - 1
    same(model(video=odd), model(video=as_float), rtol=1e-3, atol=1e-4)  # black pads both
    image = torch.randint(0, 256, (2, 1, 32, 40, 3), dtype=torch.uint8)
    same(model(video=image), model(video=image.expand(-1, 4, -1, -1, -1)))
    rows = patchify(odd, (4, 8, 8))
    same(model(video=rows, video_grid=(2, 4, 7)), model(video=odd))
    assert model(audio=torch.rand(1, 1000)).audio_pooled.shape[0] == 1


def test_padding_words_do_not_matter(model, inputs):
    text = inputs["text"].clone()
    text[..., 6:] = 0
    same(model(text=text), model(text=text[..., :6]))


def test_uint8_equals_normalised_float_in_every_backend(model, inputs):
    as_float = inputs["video"].float() / 127.5 - 1
    with use_backend("reference"):
        same(model(video=inputs["video"]), model(video=as_float), rtol=1e-3, atol=1e-4)


def test_batch_norm_ignores_invalid_rows():
    torch.manual_seed(0)
    norm, reference = BatchNorm(6, momentum=0.1, eps=1e-5).train(), torch.nn.BatchNorm1d(6)
    x, valid = torch.randn(9, 6) * 3 + 1, torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
    spoilt = torch.where(valid[:, None], x, 1e6)
    torch.testing.assert_close(norm(spoilt, valid)[valid], reference(x[valid]))
    # 6 of 9 rows are worth 5 / 8 of the momentum
    step = 0.1 * 5 / 8
    torch.testing.assert_close(norm.running_mean, step * x[valid].mean(0))
    full = x[valid].var(0) * 8 / 9  # what the biased variance of 9 rows is on average
    torch.testing.assert_close(norm.running_var, 1 - step + step * full)
    before = norm.running_mean.clone(), norm.running_var.clone()
    for rows in (0, 1):
        few = torch.arange(9) < rows
        assert norm(x, few).isfinite().all()
        assert torch.equal(norm.running_mean, before[0])
        assert torch.equal(norm.running_var, before[1])
    norm.train()(x)
    torch.testing.assert_close(norm.running_var, 0.9 * before[1] + 0.1 * x.var(0, unbiased=False))


@pytest.mark.parametrize("valid_rows", [2, 3, 5, 16])
def test_moving_statistics_are_the_data_s_whatever_is_valid(valid_rows):
    """With 2 valid rows a batch the biased variance would settle at half of the truth."""
    torch.manual_seed(0)
    norm, valid = BatchNorm(256, momentum=0.1, eps=1e-5).train(), torch.arange(16) < valid_rows
    for _ in range(600):
        norm(torch.randn(16, 256) * 3 + 1, valid)
    biased = 9 * 15 / 16
    assert norm.running_var.mean().item() == pytest.approx(biased, rel=0.04)
    assert norm.running_mean.mean().item() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
def test_batch_norm_of_bf16_weights_computes_in_fp32(buffers):
    """FSDP2's mixed precision gives it bf16 weights and fp32 buffers; ``model.bfloat16()`` both."""
    torch.manual_seed(0)
    ours, exact = (BatchNorm(6, momentum=0.1, eps=1e-5).train() for _ in range(2))
    with torch.no_grad():
        for weight, other in zip(ours.parameters(), exact.parameters(), strict=True):
            weight.copy_((torch.randn(6) * 0.5 + 1).bfloat16())
            other.copy_(weight)
            weight.data = weight.data.bfloat16()
    for name, value in ours.named_buffers():
        setattr(ours, name, value.to(buffers))
    exact.double()
    inputs = torch.randn(64, 6).add(3).bfloat16()  # statistics in bf16 would be 1e-2 off
    results = []
    for norm in (ours, exact):
        x = inputs.clone().to(norm.weight.dtype).requires_grad_()
        out = norm(x)
        (out * torch.linspace(-1, 1, 64, dtype=out.dtype)[:, None]).square().sum().backward()
        results.append((out, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    out, d_x, *_, mean, _ = results[0]
    assert out.dtype == torch.float32 and mean.dtype == buffers and d_x.dtype == torch.bfloat16
    statistics = 1e-6 if buffers == torch.float32 else 2**-8
    tolerances = (1e-6, 2**-7, 2**-8, 2**-8, statistics, statistics)
    for found, expected, tolerance in zip(results[0], results[1], tolerances, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error <= tolerance, (tuple(found.shape), error)
    norm = ours.eval()
    torch.testing.assert_close(norm(inputs), exact.eval()(inputs).float(), rtol=1e-2, atol=1e-2)


def test_a_bf16_model_trains(model, inputs):
    model.bfloat16().train()
    out = model(**inputs)
    assert out.z_video_va.dtype == torch.float32 and out.video_pooled.dtype == torch.bfloat16
    loss = vatt_loss(out, model.config).total
    loss.backward()
    assert loss.isfinite() and all(
        p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
    )


def test_zero_valid_pairs_give_zero_with_a_connected_graph(inputs):
    for config in CONFIGS.values():
        model = VATT(config).train()
        nothing = dict(
            video_valid=torch.zeros(3).bool(),
            audio_valid=torch.zeros(3).bool(),
            text_valid=torch.zeros(3, 2).bool(),
        )
        loss = vatt_loss(model(**inputs, **nothing), config, **nothing)
        assert loss.total.item() == 0
        loss.total.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and not p.grad.any()
            for p in model.parameters()
            if p.requires_grad
        )


def test_invalid_clips_change_no_other_clips_loss():
    torch.manual_seed(0)
    x, y = torch.randn(5, 8), torch.randn(5, 3, 8)
    ok = torch.tensor([1, 1, 0, 1, 1]).bool()
    whole, valid = contrastive_terms(x, y, scale=10.0, x_valid=ok, y_valid=ok)
    alone, _ = contrastive_terms(x[ok], y[ok], scale=10.0)
    torch.testing.assert_close(whole[ok], alone)
    assert whole[2] == 0 and torch.equal(valid, ok)
    torch.testing.assert_close(global_mean(whole, valid), alone.mean())


def test_learned_temperature_is_clamped_and_can_come_back():
    config = dataclasses.replace(SMALL, learn_temperature=True)
    model = VATT(config)
    assert model.scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert model.scale().item() == pytest.approx(100)
    model.clamp_temperature()
    model.scale().backward()
    assert model.log_scale.grad.item() == pytest.approx(100, rel=1e-5)
    assert not VATT(SMALL).log_scale.requires_grad


def test_bf16_autocast_stays_close_and_trains(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs)
    full = model(**inputs)
    for name in ("video_pooled", "audio_pooled", "text_pooled"):
        error = (getattr(half, name).float() - getattr(full, name)).norm() / getattr(
            full, name
        ).norm()
        assert getattr(half, name).dtype == torch.bfloat16 and error < 0.04, f"{name}: {error:.3f}"
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = vatt_loss(model(**inputs), model.config).total
    loss.backward()
    assert loss.dtype == torch.float32 and all(
        p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
    )


def test_dropout_acts_in_training_only(inputs):
    model = VATT(SMALL.with_recipe("released")).train()
    a, b = model(**inputs), model(**inputs)
    assert not torch.equal(a.video_pooled, b.video_pooled) and not torch.equal(
        a.text_pooled, b.text_pooled
    )
    model.eval()
    same(model(**inputs), model(**inputs), rtol=0, atol=0)


def test_compiles_as_one_graph(inputs):
    model = VATT(SMALL).train()
    keep = model.sample_keep(0.5, seed=0, step=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = vatt_loss(compiled(**inputs, **keep), SMALL).total
    loss.backward()
    compiled_grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    vatt_loss(model(**inputs, **keep), SMALL).total.backward()
    for ours, eager in zip(
        compiled_grads, (p.grad for p in model.parameters() if p.requires_grad), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("specific", "text"), ("agnostic", "text"), ("specific", "audio"), ("specific", "video")],
)
def test_compiles_with_dynamic_shapes(kind, name):
    """Lengths become symbols; position tables are resampled to them.

    The config's own length, where nothing is resampled, is a graph of its own, and so are float
    clips that need padding.
    """
    torch.manual_seed(0)
    towers: dict = {
        m: dataclasses.replace(SMALL.video, depth=1) for m in ("video", "audio", "text")
    }
    model = VATT(dataclasses.replace(CONFIGS[kind], **towers)).eval()
    clips = {
        "text": [torch.randint(1, 30, (2, 2, words)) for words in (9, 7, 12)],
        "audio": [torch.rand(2, samples) for samples in (900, 1500, 700)],
        "video": [torch.rand(2, frames, 24, 48, 3) * 2 - 1 for frames in (12, 16, 20)],
    }[name]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for clip in clips:
            same(compiled(**{name: clip}), model(**{name: clip}))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "functional_call"])
def test_copies_compute_the_same(model, inputs, how, tmp_path):
    expected = model(**inputs).z_video_va
    if how == "functional_call":
        state = {name: x.clone() for name, x in model.state_dict().items()}
        found = torch.func.functional_call(model, state, (), inputs).z_video_va
    elif how == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        found = torch.load(tmp_path / "model.pt", weights_only=False)(**inputs).z_video_va
    else:
        copied = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
        found = copied[how](model)(**inputs).z_video_va
    torch.testing.assert_close(found, expected)


def test_saving_and_loading(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = vf.create_model(tmp_path / "m")
    assert again.config == model.config and not again.training
    same(again(**inputs), model(**inputs), rtol=0, atol=0)


def test_create_model_takes_presets_and_short_names():
    assert vf.create_model("tiny").config == PRESETS["tiny"]
    with torch.device("meta"):
        assert vf.create_model("mbs", recipe="released").config == preset(
            "medium_base_small", "released"
        )


class FromHost(TorchDispatchMode):
    """Counts operations that take a tensor of the CPU and give one of another device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        results = result if isinstance(result, tuple | list) else (result,)
        if function.namespace == "aten" and any(
            isinstance(each, torch.Tensor) and each.device.type != "cpu" for each in results
        ):
            given = [each for each in pytree.tree_leaves(args) if isinstance(each, torch.Tensor)]
            if any(each.device.type == "cpu" and each.ndim for each in given):
                self.found.append(str(function))
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_copies_nothing_from_the_host(name, inputs):
    """On a GPU each copy waits for all that was enqueued before, and no graph can hold it."""
    config = CONFIGS[name]
    with torch.device("meta"):
        model = VATT(config).train()
    keeps = model.sample_keep(0.5, seed=0, step=0)
    given = {key: value.to("meta") for key, value in (inputs | keeps).items()}
    with FromHost() as copies:
        loss = vatt_loss(model(**given), config, scale=model.scale())
        loss.total.backward()
    assert copies.found == []
    with FromHost() as copies:  # it does count: indices on the host, once for each tower
        model(**given | keeps)
    assert copies.found == ["aten._to_copy.default"] * 2


@pytest.mark.parametrize("capturing", [False, True])
def test_what_goes_to_a_gpu_is_pinned_first(monkeypatch, capturing):
    class Recorder:
        device, calls = torch.device("cpu"), ()

        def pin_memory(self):
            self.calls += ("pin_memory",)
            return self

        def to(self, device, non_blocking):
            self.calls += (device.type, non_blocking)
            return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    pinned = () if capturing else ("pin_memory",)
    sent = model_module._send(Recorder(), torch.device("cuda"))
    assert sent.calls == (*pinned, "cuda", True)
    assert model_module._send(Recorder(), torch.device("cpu")).calls == ("cpu", True)


def test_the_buckets_of_distances_survive_a_model_without_memory():
    """They are no weights: what fills in the weights does not know them."""
    model = VATT(SMALL)
    expected = model.text_encoder.distance_buckets
    with torch.device("meta"):
        empty = VATT(SMALL)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.text_encoder.distance_buckets, expected) and expected.any()
    assert not [name for name in model.state_dict() if "buckets" in name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i: m(), "give at least one"),
        (lambda m, i: m(video=i["video"][..., :2]), r"takes frames \(B, T, H, W, 3\)"),
        (lambda m, i: m(video=i["video"][:0]), "empty batch"),
        (lambda m, i: m(video=i["video"].long()), "must be uint8 or floating point"),
        (lambda m, i: m(audio=i["audio"][:, None, None]), r"takes a waveform \(B, S\)"),
        (lambda m, i: m(text=i["text"].float()), "integer word ids"),
        (lambda m, i: m(video=torch.zeros(1, 9, 768)), r"a grid of \(2, 4, 5\) takes"),
        (
            lambda m, i: m(video=i["video"], video_keep=torch.tensor([0, 40])),
            r"indices lie in 0 \.\. 39",
        ),
        (lambda m, i: m(video=i["video"], video_keep=np.array([3, 3])), "repeats an index"),
        (lambda m, i: m(video=i["video"], video_keep=torch.tensor([[1], [2]])), "for a batch of 3"),
        (lambda m, i: m.sample_keep(1.0, seed=0, step=0), r"lies in \[0, 1\)"),
        (lambda m, i: m.encode(text="a dog"), "has no vocabulary"),
        (lambda m, i: m.encode(), "nothing to encode"),
    ],
)
def test_bad_input_is_named(inputs, call, message):
    with pytest.raises(ValueError, match=message):
        call(VATT(SMALL).eval(), inputs)


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="unknown preset 'big'"):
        preset("big")
    with pytest.raises(ValueError, match="neither a folder nor a preset"):
        create_model("big")
    with pytest.raises(ValueError, match="unknown VATTConfig keys: widht"):
        VATTConfig.from_dict({"widht": 3})
    with pytest.raises(ValueError, match="unknown TowerConfig keys: deep"):
        VATTConfig.from_json('{"video": {"deep": 3}}')
    with pytest.raises(ValueError, match="frames is 0"):
        dataclasses.replace(SMALL, frames=0)
    with pytest.raises(ValueError, match="nce_form is 'clip'"):
        dataclasses.replace(SMALL, nce_form="clip")
    with pytest.raises(ValueError, match="must be the same tower"):
        dataclasses.replace(TRUNK, audio=dataclasses.replace(SMALL.audio, depth=1))


def test_damaged_folders_are_named(tmp_path):
    folder = tmp_path / "m"
    with pytest.raises(ValueError, match=r"has no config\.json"):
        VATT.from_pretrained(tmp_path)
    VATT(SMALL).save_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        VATT.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text(dataclasses.replace(SMALL, d_va=32).to_json())
    with pytest.raises(
        ValueError,
        match=r"does not fit the config: .* is \(64, 128\), the config asks for \(32, 128\)",
    ):
        VATT.from_pretrained(folder)
    (folder / "config.json").write_text('{"frames": 8, ')
    with pytest.raises(ValueError, match="config is not JSON"):
        VATT.from_pretrained(folder)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_tensors(folder / "config.json")


# -- what the release gets wrong where few rows are valid ------------------------------------------


def test_one_captioned_clip_does_not_poison_a_run():
    """Batch norm makes its embedding its bias, 0 at the start; a unit vector's gradient there
    would be divided by 1e-12, and stay in Adam's second moment for good."""
    torch.manual_seed(0)
    model = VATT(SMALL).train()
    valid = torch.zeros(4, 2, dtype=torch.bool)
    valid[1, 0] = True
    output = model(
        torch.randint(0, 256, (4, 8, 32, 40, 3), dtype=torch.uint8),
        torch.rand(4, 2560),
        torch.randint(1, 30, (4, 2, 16)),
        text_valid=valid,
    )
    assert output.z_text_vt[1, 0].abs().max() < 1e-6
    vatt_loss(output, SMALL, text_valid=valid).total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients) < 1e3  # it was 4e12


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_embeddings_without_a_direction_pass_no_gradient(framework):
    nan = float("nan")
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0], [nan, 1.0]], np.float32)
    expected = np.array([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [nan, nan]], np.float32)
    if framework == "torch":
        z = torch.tensor(rows, requires_grad=True)
        unit = losses_module._TorchDevices().unit(z)
        unit[:, 0].sum().backward()
        found, gradient = unit.detach().numpy(), z.grad.numpy()
    else:
        jax = pytest.importorskip("jax")
        from vatt_fast.on_jax.losses import _JaxDevices

        unit_of = _JaxDevices(None).unit
        found = np.asarray(unit_of(jax.numpy.asarray(rows)))
        gradient = np.asarray(jax.grad(lambda z: unit_of(z)[:, 0].sum())(jax.numpy.asarray(rows)))
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(gradient[0], [0.128, -0.096], rtol=1e-5)
    assert not gradient[1:3].any() and np.isnan(gradient[3]).all()


def test_positions_are_resampled_in_fp32_under_autocast():
    torch.manual_seed(0)
    table = model_module.PositionTable((1200,), 32)
    expected = table((1500,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(table((1500,)), expected)


def test_weights_assigned_to_a_model_without_memory_are_the_model(inputs):
    torch.manual_seed(0)
    whole = VATT(SMALL).eval()
    with torch.device("meta"):
        empty = VATT(SMALL)
    empty.load_state_dict(whole.state_dict(), assign=True)
    same(whole(text=inputs["text"]), empty.eval()(text=inputs["text"]))
    assert not [name for name, buffer in empty.named_buffers() if buffer.is_meta]
