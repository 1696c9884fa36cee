"""The JAX model against the torch one from the same weights, and against the recorded layers."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from oracle import agnostic_config, array, our_tensors, specific_config

jax = pytest.importorskip("jax", reason="the JAX model needs jax")

import jax.numpy as jnp  # noqa: E402

from vatt_fast.config import TowerConfig, VATTConfig  # noqa: E402
from vatt_fast.kernels import use_backend  # noqa: E402
from vatt_fast.kernels.patch_embed import patchify  # noqa: E402
from vatt_fast.losses import vatt_loss  # noqa: E402
from vatt_fast.model import VATT, VATTOutput  # noqa: E402
from vatt_fast.on_jax import losses as jax_losses  # noqa: E402
from vatt_fast.on_jax import model as jax_model  # noqa: E402
from vatt_fast.on_jax import weights as jax_weights  # noqa: E402

TOWER = TowerConfig(depth=3, dim=32, mlp_dim=48, num_heads=2, head_dim=8)
SIZES = VATTConfig(
    video=TOWER,
    audio=dataclasses.replace(TOWER, depth=1, dim=16),
    text=dataclasses.replace(TOWER, depth=1, num_heads=3),
    frames=4,
    height=16,
    width=24,
    video_patch=(2, 8, 8),
    samples=600,
    audio_patch=64,
    words=6,
    texts_per_clip=3,
    vocab_size=40,
    relative_buckets=8,
    relative_max_distance=16,
    d_va=24,
    d_vt=16,
    learn_temperature=True,
)
AGNOSTIC = dict(kind="modality_agnostic", video=TOWER, audio=TOWER, text=TOWER, post_proj_dim=20)
CLIPS = 6
OUTPUTS, GRADIENTS = 1e-5, 1e-4


def config_of(kind: str, recipe: str) -> VATTConfig:
    sizes = dataclasses.replace(SIZES, **AGNOSTIC) if kind == "modality_agnostic" else SIZES
    # dropout draws from another generator in each framework
    return dataclasses.replace(sizes.with_recipe(recipe), dropout=0.0, train_words=True)


def model_of(config: VATTConfig) -> VATT:
    torch.manual_seed(0)
    model = VATT(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # at their initial 0 and 1 they would hide mistakes
            if name.endswith((".bias", "norm.weight")):
                value.add_(torch.randn_like(value) * 0.1)
    return model


def inputs_of(config: VATTConfig) -> tuple[dict, dict]:
    draw = np.random.default_rng(0)
    text = draw.integers(
        1, config.vocab_size, (CLIPS, config.texts_per_clip, config.words), dtype=np.int32
    )
    text[0, 0, 3:], text[1, 2] = 0, 0
    inputs = dict(
        video=draw.integers(
            0, 256, (CLIPS, config.frames, config.height, config.width, 3), dtype=np.uint8
        ),
        audio=draw.uniform(-1, 1, (CLIPS, config.samples)).astype(np.float32),
        text=text,
    )
    text_valid = np.ones((CLIPS, config.texts_per_clip), bool)
    text_valid[1, 2], text_valid[4] = False, False
    valid = dict(
        video_valid=np.arange(CLIPS) != 2, audio_valid=np.arange(CLIPS) != 3, text_valid=text_valid
    )
    return inputs, valid


def tensors(arrays: dict) -> dict:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def as_namespace(out) -> SimpleNamespace:
    """A JAX output with torch tensors, for the checks of tests/support/oracle.py."""
    return SimpleNamespace(
        **{
            name: None if value is None else torch.tensor(np.asarray(value))
            for name, value in vars(out).items()
        }
    )


def jitted(config: VATTConfig, **options):
    """(params, statistics, inputs) -> output, compiled."""
    return jax.jit(
        lambda params, statistics, inputs: jax_model.forward(
            params, statistics, **inputs, config=config, **options
        )[0]
    )


def assert_close(
    ours, theirs: torch.Tensor, tolerance: float, name: str, floor: float = 0.0
) -> None:
    """Largest difference over the largest value, or over ``floor`` where values are noise."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape, name
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), floor)
    assert error <= tolerance, f"{name}: max error / max value {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("kind", ["modality_specific", "modality_agnostic"])
def test_outputs_loss_and_gradients_are_those_of_torch(kind, recipe):
    config = config_of(kind, recipe)
    model = model_of(config).train()
    params, statistics = jax_weights.from_torch(model)
    inputs, valid = inputs_of(config)
    keep = model.sample_keep(
        0.5, seed=0, step=0, per="clip" if recipe == "paper" else "batch", batch=CLIPS
    )
    # six clips behind batch norms raise a kernel's last bits to 1e-4; tests/kernels judges kernels
    with use_backend(attention="reference"):
        expected = model(**tensors(inputs), **keep, **tensors(valid))
        loss = vatt_loss(expected, config, scale=model.scale(), **tensors(valid))
        loss.total.backward()

    options = {name: value.numpy() for name, value in keep.items()} | valid
    rows = patchify(inputs["video"], config.video_patch)
    kept = np.broadcast_to(options["video_keep"], (CLIPS, options["video_keep"].shape[-1]))
    # only the kept rows; torch drops them itself
    given = inputs | {"video": np.take_along_axis(rows, kept[..., None], 1)}

    def loss_of(params):
        out, after = jax_model.forward(
            params, statistics, **given, config=config, training=True, **options
        )
        found = jax_losses.vatt_loss(out, config, scale=jax_model.scale(params, config), **valid)
        return found.total, (found, out, after)

    gradients, (found, out, after) = jax.jit(jax.grad(loss_of, has_aux=True))(params)
    for name, value in vars(out).items():
        theirs = getattr(expected, name)
        assert (value is None) == (theirs is None), name
        if value is not None:
            # behind batch norms over so few clips the rounding of fp32 grows, to what
            # tests/support/oracle.py says
            slack = (
                0.0 if name.endswith("pooled") else oracle.amplified_noise(model, expected, name)
            )
            assert_close(value, theirs, OUTPUTS + slack, name)
    for name in ("total", "va", "vt"):
        assert_close(getattr(found, name), getattr(loss, name), OUTPUTS, name)
    theirs = jax_weights.rearrange({name: p.grad for name, p in model.named_parameters()}, config)
    assert set(theirs) == set(gradients)
    largest = max(value.abs().max().item() for value in theirs.values())
    for name, value in theirs.items():
        assert_close(gradients[name], value, GRADIENTS, name, floor=1e-2 * largest)
    state = jax_weights.rearrange(model.state_dict(), config)
    for name, value in after.items():
        assert_close(value, state[name], OUTPUTS, name, floor=0.1)


@pytest.fixture(scope="module")
def specific():
    model = model_of(config_of("modality_specific", "paper")).eval()
    return model, *jax_weights.from_torch(model)


def test_any_subset_any_size_frames_or_rows(specific):
    """Other sizes than the config's resample positions; features leave the pooled vector alone."""
    model, *weights = specific
    draw = np.random.default_rng(1)
    video = draw.uniform(-1, 1, (2, 3, 17, 33, 3)).astype(np.float32)
    audio = draw.uniform(-1, 1, (2, 400)).astype(np.float32)
    text = draw.integers(0, 40, (2, 4), dtype=np.int32)
    for inputs, features in (
        (dict(video=video), True),
        (dict(video=video[:, :1]), False),
        (dict(audio=audio), True),
        (dict(text=text), True),
    ):
        out = jitted(model.config, features=features)(*weights, inputs)
        with torch.no_grad():
            expected = model(**tensors(inputs), features=features)
        for name, value in vars(out).items():
            theirs = getattr(expected, name)
            assert (value is None) == (theirs is None), name
            if value is not None:
                assert_close(value, theirs, OUTPUTS, f"{name} of {list(inputs)}")


def test_bf16_is_close_and_leaves_embeddings_fp32(specific):
    model, *weights = specific
    inputs = inputs_of(model.config)[0]
    with torch.no_grad():
        expected = model(**tensors(inputs))
    out = jitted(model.config, dtype=jnp.bfloat16)(*weights, inputs)
    assert out.video_pooled.dtype == jnp.bfloat16 and out.z_text_vt.dtype == jnp.float32
    for name in ("video_pooled", "audio_pooled", "text_pooled"):
        np.testing.assert_allclose(
            getattr(out, name).astype(jnp.float32), getattr(expected, name), atol=0.1
        )


def test_the_loss_rounds_embeddings_as_autocast_does():
    """Products of embeddings are of bf16 in both frameworks; fp32 would be 100 times further."""
    config = config_of("modality_specific", "released")
    rng = np.random.default_rng(0)
    shapes = {"z_video_va": (8, 64), "z_audio_va": (8, 64)}
    z = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def loss(z, dtype=jnp.bfloat16):
        output = VATTOutput(**z, video_pooled=jnp.zeros((8, 4), dtype))
        return jax_losses.vatt_loss(output, config).total

    ours, gradients = jax.value_and_grad(loss)(z)
    theirs = {name: torch.from_numpy(value).requires_grad_() for name, value in z.items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = vatt_loss(VATTOutput(**theirs), config).total
    expected.backward()
    expected = expected.item()
    apart = abs(float(loss(z, jnp.float32)) - expected)
    assert abs(float(ours) - expected) < 0.01 * apart
    for name, value in theirs.items():
        error = np.linalg.norm(gradients[name] - value.grad.numpy())
        assert error < 3e-3 * np.linalg.norm(value.grad), name


def test_dropout_draws_anew_and_vanishes_without_a_key():
    config = dataclasses.replace(config_of("modality_specific", "released"), dropout=0.3)
    weights, text = jax_weights.from_torch(model_of(config)), inputs_of(config)[0]["text"]
    run = jax.jit(
        lambda key: jax_model.forward(*weights, text=text, config=config, key=key)[0].text_pooled
    )
    a, b, again = (run(jax.random.key(seed)) for seed in (0, 1, 0))
    assert (a != b).any() and (a == again).all()
    plain = jax.jit(lambda: jax_model.forward(*weights, text=text, config=config)[0].text_pooled)()
    expected = model_of(config).eval()(text=torch.from_numpy(text)).text_pooled
    assert_close(plain, expected, OUTPUTS, "text_pooled")


def test_a_saved_folder_is_read_by_both_frameworks(tmp_path):
    config = config_of("modality_agnostic", "released")
    model = model_of(config)
    model.save_pretrained(tmp_path / "torch")
    read, params, statistics = jax_weights.load(tmp_path / "torch")
    assert read == config
    assert params["trunk.blocks.q.weight"].shape == (2, 2, 8, 32) and params[
        "trunk.last.out.weight"
    ].shape == (2, 8, 32)
    jax_weights.save(tmp_path / "jax", config, params, statistics)
    again = VATT.from_pretrained(tmp_path / "jax")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    expected, _ = jax_weights.shapes(config)
    assert {name: value.shape for name, value in params.items()} == {
        name: value.shape for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no input"),
        (
            dict(video=np.zeros((1, 5, 192), np.uint8)),
            r"a grid of \(2, 2, 3\) takes \(B, 12, 384\)",
        ),
        (dict(audio=np.zeros((0, 600), np.float32)), "leave the modality out"),
        (dict(text=np.zeros((1, 6), np.float32)), "integer word ids"),
        (dict(text=np.full((1, 6), 99)), "ids 99 to 99; this model's vocabulary has 40 words"),
        (dict(audio=np.zeros((2, 600), np.float32), audio_keep=np.array([3, 1])), "not sorted"),
    ],
)
def test_bad_inputs_are_named(specific, inputs, message):
    model, params, statistics = specific
    with pytest.raises(ValueError, match=message):
        jax_model.forward(params, statistics, **inputs, config=model.config)


# -- the recording ---------------------------------------------------------------------------------


def run_recorded(model: VATT, inputs: dict[str, torch.Tensor], **options):
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return as_namespace(jitted(model.config, **options)(*jax_weights.from_torch(model), arrays))


def test_recorded_towers_at_other_sizes():
    video = oracle.model_with(specific_config(), "video")
    for key, recorded in (("x_image", "pooled_image"), ("x_interp", "pooled_interp")):
        pooled = run_recorded(video, {"video": array(f"video/{key}")}).video_pooled
        oracle.assert_agrees(pooled, f"video/{recorded}", oracle.RESAMPLED)
    audio = oracle.model_with(specific_config(), "audio")
    recorded = array("audio/pooled_interp")
    longer = run_recorded(audio, {"audio": array("audio/x_interp").squeeze(-1)}).audio_pooled
    assert (longer - recorded[: len(longer)]).abs().max() <= oracle.RESAMPLED * recorded.abs().max()


def test_recorded_features():
    model = oracle.model_with(specific_config(), "text")
    out = run_recorded(model, {"text": array("text/ids")}, features=True)
    oracle.assert_agrees(out.text_features[:, 1:], "text/words", oracle.TOWERS)
    model = oracle.model_with(agnostic_config(), "uvatt")
    inputs = dict(
        video=array("uvatt/video_x"),
        audio=array("uvatt/audio_x").squeeze(-1),
        text=array("uvatt/ids"),
    )
    out = run_recorded(model, inputs, features=True)
    for modality in inputs:
        oracle.assert_agrees(
            getattr(out, f"{modality}_pooled"), f"uvatt/{modality}_pooled", oracle.TOWERS
        )
        oracle.assert_agrees(
            getattr(out, f"{modality}_features")[:, 1:],
            f"uvatt/{modality}_features",
            oracle.TOWERS,
        )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_recorded_common_space(mode):
    model = oracle.model_with(specific_config(), "head")
    params, statistics = (
        jax_model.part(arrays, "common_space") for arrays in jax_weights.from_torch(model)
    )
    space = jax_model.CommonSpace(params, statistics, model.config, training=mode == "train")
    z_video_va, z_video_vt = space.video(array("head/v").numpy())
    found = {"v_toaud": z_video_va, "v_totxt": z_video_vt}
    found |= {
        "a_tovid": space.audio(array("head/a").numpy()),
        "t_tovid": space.text(array("head/t").numpy()),
    }
    for name, value in found.items():
        oracle.assert_agrees(
            torch.tensor(np.asarray(value)), f"head/{mode}/{name}", oracle.EMBEDDINGS
        )
    if mode == "train":
        for name, value in our_tensors("head/after_train").items():
            ours = np.asarray(space.statistics[name.removeprefix("common_space.")])
            np.testing.assert_allclose(ours, value, rtol=oracle.EMBEDDINGS, atol=1e-6, err_msg=name)


def test_recorded_losses():
    per_device, texts, devices, temperature = array("loss/B_L_R_tau").tolist()
    clips = int(per_device * devices)
    x = {name: array(f"loss/{name}").unflatten(0, (clips, -1)).numpy() for name in oracle.INPUTS}
    assert x["t_vt"].shape[1] == texts

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, has_aux=True)
    def gradients_of(x, form, valid):
        options = dict(scale=1 / temperature, form=form)
        va = jax_losses.contrastive_terms(
            x["v_va"][:, 0], x["a_va"][:, 0], y_valid=valid["audio"], **options
        )
        vt = jax_losses.contrastive_terms(
            x["v_vt"][:, 0], x["t_vt"], y_valid=valid["text"], **options
        )
        vidaud, vidtxt = jax_losses.global_mean(*va), jax_losses.global_mean(*vt)
        loss = (vidaud + vidtxt) / 2
        return loss, {"vidaud": vidaud, "vidtxt": vidtxt, "per_replica": loss}

    results = []
    for _, form, masked in oracle.loss_cases():
        valid = {
            m: array(f"loss/{m}_mask").numpy() > 0 if masked else None for m in ("audio", "text")
        }
        gradients, found = gradients_of(x, form, valid)
        found |= {
            f"grad_{name}": value.reshape(-1, value.shape[-1]) for name, value in gradients.items()
        }
        results.append([{name: torch.tensor(np.asarray(value)) for name, value in found.items()}])
    oracle.check_losses(1, results)


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_recorded_end_to_end(name):
    model = oracle.model_with(oracle.CONFIGS[name](), name)
    model.common_space.train()
    video, audio = array(f"{name}/in_video"), array(f"{name}/in_audio").squeeze(-1)
    text = array(f"{name}/in_text").unflatten(0, (video.shape[0], -1))
    out = run_recorded(model, dict(video=video, audio=audio, text=text), training=True)
    for modality in ("video", "audio", "text"):
        oracle.assert_agrees(
            getattr(out, f"{modality}_pooled"), f"{name}/pooled_{modality}", oracle.TOWERS
        )
    recorded = {
        "z_video_va": "v_toaud",
        "z_audio_va": "a_tovid",
        "z_video_vt": "v_totxt",
        "z_text_vt": "t_tovid",
    }
    for ours, theirs in recorded.items():
        tolerance = oracle.EMBEDDINGS + oracle.amplified_noise(model, out, ours)
        oracle.assert_agrees(getattr(out, ours), f"head/{name}/{theirs}", tolerance)
