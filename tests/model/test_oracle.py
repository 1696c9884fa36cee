"""Our model against the recorded behaviour of the released TensorFlow layers.

Module by module and end to end.
"""

import math
import re

import pytest
import torch
from oracle import (
    CONFIGS,
    EMBEDDINGS,
    GRADIENTS,
    INPUTS,
    RESAMPLED,
    TOWERS,
    agnostic_config,
    amplified_noise,
    array,
    assert_agrees,
    check_losses,
    loss_cases,
    model_with,
    our_tensors,
    recording,
    specific_config,
)
from processes import in_processes

from vatt_fast import collectives
from vatt_fast.inputs import video_input
from vatt_fast.kernels import patch_embed, patchify, sample_keep
from vatt_fast.losses import contrastive_terms, vatt_loss
from vatt_fast.model import VATT
from vatt_fast.positions import relative_position_buckets, resample_matrix


@pytest.fixture
def video():
    return model_with(specific_config(), "video")


def test_every_weight_of_both_models_has_one_place():
    for name, config in CONFIGS.items():
        missing = set(VATT(config()).state_dict()) - set(our_tensors(f"{name}/w"))
        assert missing == {"log_scale"}


def test_video_tower(video):
    out = video(video=array("video/x"), features=True)
    assert_agrees(out.video_pooled, "video/pooled", TOWERS)
    assert_agrees(out.video_features[:, 1:], "video/predictions_3d", TOWERS)
    pooled_only = video(video=array("video/x"))
    assert pooled_only.video_features is None
    assert_agrees(pooled_only.video_pooled, "video/pooled", TOWERS)


def test_video_patches_positions_and_first_attention(video):
    tokens, config = video.video_tokens, video.config
    patches = patchify(array("video/x"), config.video_patch)
    embedded = patch_embed(
        patches, tokens.project.weight, tokens.project.bias, scale=1.0, shift=0.0
    )
    assert_agrees(embedded, "video/patch_embeddings", TOWERS)
    assert_agrees(tokens.position(config.video_grid), "video/pos_table_after_ln", TOWERS)
    x = tokens(patches, video_input(config, patches), None)
    block = video.video_encoder.blocks[0]
    q, k, _ = block.qkv(block.attention_norm(x)).unflatten(-1, (3, block.num_heads, -1)).unbind(2)
    assert_agrees(
        (block.scale * torch.einsum("bthd,bshd->bhts", q, k)).softmax(-1), "video/attn0", TOWERS
    )


def test_an_image_is_one_temporal_patch(video):
    assert_agrees(video(video=array("video/x_image")).video_pooled, "video/pooled_image", RESAMPLED)


def test_other_video_sizes_resample_the_tables(video):
    tables, patch = video.video_tokens.position.tables, video.config.video_patch
    names = {"temporal": 0, "vertical": 1, "horizontal": 2}
    for key in (k for k in recording() if re.fullmatch(r"video/\w+_table_\d+to\d+", k)):
        axis, old, new = re.fullmatch(r"video/(\w+)_table_(\d+)to(\d+)", key).groups()
        matrix = torch.from_numpy(resample_matrix(int(old), int(new))).float()
        assert_agrees(matrix @ tables[names[axis]], key, RESAMPLED)
    x = array("video/x_interp")
    grid = tuple(-(-size // p) for size, p in zip(x.shape[1:4], patch, strict=True))
    assert_agrees(video.video_tokens.position(grid), "video/pos_interp_after_ln", RESAMPLED)
    assert_agrees(video(video=x).video_pooled, "video/pooled_interp", RESAMPLED)


@pytest.mark.parametrize(
    "key", sorted(k for k in recording() if re.fullmatch(r"interp/\d+to\d+/in", k))
)
def test_resampling_of_a_table(key):
    old, new = map(int, re.findall(r"\d+", key))
    if (old, new) == (1200, 600):
        # the release's own solve diverges here; a smooth table resampled to half must still be
        # every second row
        table = torch.linspace(0, 6, old, dtype=torch.float64).sin()
        assert torch.allclose(
            torch.from_numpy(resample_matrix(old, new)) @ table, table[::2], atol=1e-9
        )
    else:
        assert_agrees(
            torch.from_numpy(resample_matrix(old, new)).float() @ array(key),
            key.replace("/in", "/out"),
            RESAMPLED,
        )


def test_audio_tower():
    model = model_with(specific_config(), "audio")
    out = model(audio=array("audio/x").squeeze(-1), features=True)
    assert_agrees(out.audio_pooled, "audio/pooled", TOWERS)
    assert_agrees(out.audio_features[:, 1:], "audio/predictions_1d", TOWERS)
    # a recording may hold more clips for the pooled output than it keeps inputs for
    longer = model(audio=array("audio/x_interp").squeeze(-1)).audio_pooled
    recorded = array("audio/pooled_interp")
    assert (longer - recorded[: len(longer)]).abs().max() <= RESAMPLED * recorded.abs().max()


def test_text_tower():
    model = model_with(specific_config(), "text")
    out = model(text=array("text/ids"), features=True)
    assert_agrees(out.text_pooled, "text/pooled", TOWERS)
    assert_agrees(out.text_features[:, 1:], "text/words", TOWERS)
    assert_agrees(model(text=array("text/ids")).text_pooled, "text/pooled", TOWERS)


def test_relative_positions():
    c = specific_config()
    buckets = array("text/rel_bucket_128")
    ours = relative_position_buckets(buckets.shape[0], c.relative_buckets, c.relative_max_distance)
    assert torch.equal(torch.from_numpy(ours), buckets.long())
    model = model_with(c, "text")
    assert_agrees(model.text_encoder._bias(array("text/bias_17").shape[-1]), "text/bias_17", TOWERS)


def test_modality_agnostic_trunk():
    model = model_with(agnostic_config(), "uvatt")
    inputs = dict(
        video=array("uvatt/video_x"),
        audio=array("uvatt/audio_x").squeeze(-1),
        text=array("uvatt/ids"),
    )
    out, pooled = model(**inputs, features=True), model(**inputs)
    for modality in inputs:
        assert_agrees(getattr(out, f"{modality}_pooled"), f"uvatt/{modality}_pooled", TOWERS)
        assert_agrees(
            getattr(out, f"{modality}_features")[:, 1:], f"uvatt/{modality}_features", TOWERS
        )
        assert_agrees(getattr(pooled, f"{modality}_pooled"), f"uvatt/{modality}_pooled", TOWERS)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_common_space(mode):
    heads = model_with(specific_config(), "head").common_space.train(mode == "train")
    z_video_va, z_video_vt = heads.video(array("head/v"))
    assert_agrees(z_video_va, f"head/{mode}/v_toaud", EMBEDDINGS)
    assert_agrees(z_video_vt, f"head/{mode}/v_totxt", EMBEDDINGS)
    assert_agrees(heads.audio(array("head/a")), f"head/{mode}/a_tovid", EMBEDDINGS)
    assert_agrees(heads.text(array("head/t")), f"head/{mode}/t_tovid", EMBEDDINGS)
    if mode == "train":
        after, state = our_tensors("head/after_train"), heads.state_dict(prefix="common_space.")
        assert len(after) == 6
        for name, value in after.items():
            torch.testing.assert_close(state[name], value, rtol=EMBEDDINGS, atol=1e-6, msg=name)


def test_drop_token_keeps_the_same_patches_in_every_clip():
    kept, config = array("droptoken/kept_idx").long(), specific_config()
    assert (kept == kept[:1]).all()
    ours = sample_keep(
        config.num_video_patches,
        1 - kept.shape[1] / config.num_video_patches,
        seed=0,
        step=0,
        stream="video",
    )
    assert ours.shape == kept.shape[1:]


# -- losses ----------------------------------------------------------------------------------------


def device_loss(rank: int, world: int, form: str, masked: int) -> dict[str, torch.Tensor]:
    """This device's loss with the release's per-device counts, and its inputs' gradients."""
    per_device, texts, recorded_world, temperature = array("loss/B_L_R_tau").tolist()
    clips = int(per_device * recorded_world) // world
    mine = slice(rank * clips, (rank + 1) * clips)
    x = {
        name: array(f"loss/{name}")
        .unflatten(0, (int(per_device * recorded_world), -1))[mine]
        .clone()
        for name in INPUTS
    }
    for value in x.values():
        value.requires_grad_()
    valid = {m: array(f"loss/{m}_mask")[mine] > 0 if masked else None for m in ("audio", "text")}
    options = dict(scale=1 / temperature, form=form)
    va, va_valid = contrastive_terms(
        x["v_va"][:, 0], x["a_va"][:, 0], y_valid=valid["audio"], **options
    )
    vt, vt_valid = contrastive_terms(x["v_vt"][:, 0], x["t_vt"], y_valid=valid["text"], **options)
    assert x["t_vt"].shape[1] == texts
    vidaud, vidtxt = (
        terms.sum() / ok.sum().clamp(min=1) for terms, ok in ((va, va_valid), (vt, vt_valid))
    )
    loss = (vidaud + vidtxt) / 2
    (loss / world).backward()  # the recorded total is the mean over devices
    return {"vidaud": vidaud.detach(), "vidtxt": vidtxt.detach(), "per_replica": loss.detach()} | {
        f"grad_{name}": value.grad.flatten(0, 1) for name, value in x.items()
    }


def test_losses_on_one_device():
    check_losses(1, [[device_loss(0, 1, form, masked)] for _, form, masked in loss_cases()])


def device_losses(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    assert collectives.world_size() == world
    return [device_loss(rank, world, form, masked) for _, form, masked in loss_cases()]


def test_losses_on_two_devices():
    world = int(array("loss/B_L_R_tau")[2])
    check_losses(world, list(zip(*in_processes(world, device_losses), strict=True)))


# -- end to end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_end_to_end(name):
    config = CONFIGS[name]()
    model = model_with(config, name)
    # moving statistics in the recording are those after the call; batch statistics are what the
    # call used
    model.common_space.train()
    video, audio = array(f"{name}/in_video"), array(f"{name}/in_audio").squeeze(-1)
    clips = video.shape[0]
    text = array(f"{name}/in_text").unflatten(0, (clips, -1))
    text_valid = (array(f"{name}/text_mask") > 0)[:, None].expand(text.shape[:2])
    out = model(video, audio, text)
    for modality in ("video", "audio", "text"):
        assert_agrees(getattr(out, f"{modality}_pooled"), f"{name}/pooled_{modality}", TOWERS)
    recorded = {
        "z_video_va": "v_toaud",
        "z_audio_va": "a_tovid",
        "z_video_vt": "v_totxt",
        "z_text_vt": "t_tovid",
    }
    for ours, theirs in recorded.items():
        assert_agrees(
            getattr(out, ours),
            f"head/{name}/{theirs}",
            EMBEDDINGS + amplified_noise(model, out, ours),
        )
    loss = vatt_loss(out, config, text_valid=text_valid)
    assert math.isclose(loss.total.item(), array(f"{name}/loss").item(), abs_tol=1e-5)

    loss.total.backward()
    gradients = our_tensors(f"{name}/g")
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trainable == set(gradients)
    largest = max(value.abs().max() for value in gradients.values())
    for key, value in model.named_parameters():
        if not value.requires_grad:
            continue
        theirs, ours = gradients[key], value.grad
        # key biases and a LayerNorm's beta before a batch norm have no gradient in exact
        # arithmetic: what is recorded there is noise
        noise = 3e-7 * largest
        error = (ours - theirs).abs().max()
        assert error <= GRADIENTS * theirs.abs().max() + noise, (
            f"{key}: {error:.1e} of {theirs.abs().max():.1e}"
        )
