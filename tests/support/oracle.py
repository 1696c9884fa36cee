"""The recording of the released layers: its sizes as configs, its weights under our names, checks.

``VATT_ORACLE`` points at another recording of the same form; every size comes from its
``config_json``.
"""

import copy
import json
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from vatt_fast.config import TowerConfig, VATTConfig
from vatt_fast.model import VATT

# released name (after the module's own) -> ours; {i} is the layer
_ENCODER = {
    r"layer_(\d+)/layer_norm/(gamma|beta)": r"blocks.\1.attention_norm.\2",
    r"layer_(\d+)/self_attention/layer_norm/weight": r"blocks.\1.attention_norm.gamma",
    r"layer_(\d+)/(?:multi_head|self)_attention/([qkv])/(kernel|bias)": r"blocks.\1.\2.\3",
    r"layer_(\d+)/(?:multi_head|self)_attention/o/(kernel|bias)": r"blocks.\1.out.\2",
    r"layer_\d+/self_attention/relative_attention_bias/embeddings": r"relative_bias",
    r"layer_(\d+)/feed_forward/dense_gelu_dense/wi/(kernel|bias)": r"blocks.\1.mlp_in.\2",
    r"layer_(\d+)/feed_forward/dense_gelu_dense/wo/(kernel|bias)": r"blocks.\1.mlp_out.\2",
    r"layer_(\d+)/feed_forward/layer_norm/(gamma|beta)": r"blocks.\1.mlp_norm.\2",
    r"final_layer_norm/(gamma|beta)": r"norm.\1",
    r"final_layer_norm/weight": r"norm.gamma",
}
_POSITION = {
    r"temporal_position_embeddings/embeddings": "position.tables.0",
    r"vertical_position_embeddings/embeddings": "position.tables.1",
    r"horizontal_position_embeddings/embeddings": "position.tables.2",
    r"layer_norm/(gamma|beta)": r"position.norm.\1",
}


def _under(released: str, ours: str, table: dict[str, str]) -> dict[str, str]:
    return {released + pattern: ours + name for pattern, name in table.items()}


_NAMES = {
    r"vi_tx_3d/agg_embedding": "video_tokens.agg",
    r"vi_tx_3d/voxel_to_patch/(kernel|bias)": r"video_tokens.project.\1",
    **_under("vi_tx_3d/spatio_temporal_embeddings/", "video_tokens.", _POSITION),
    **_under("vi_tx_3d/transformer/", "video_encoder.", _ENCODER),
    r"au_tx_1d/agg_embedding": "audio_tokens.agg",
    r"au_tx_1d/waveform_to_patch/(kernel|bias)": r"audio_tokens.project.\1",
    **_under("au_tx_1d/temporal_embeddings/", "audio_tokens.", _POSITION),
    **_under("au_tx_1d/transformer/", "audio_encoder.", _ENCODER),
    r"text_module/agg_embedding": "text_tokens.agg",
    r"text_module/pre_proj/kernel": "text_tokens.pre_proj.kernel",
    r"text_module/embedding\w*/embeddings": "text_tokens.table.weight",
    **_under("text_module/t5_encoder/", "text_encoder.", _ENCODER),
    r"unified_vat_transformer/vid_agg_embedding": "video_tokens.agg",
    r"unified_vat_transformer/aud_agg_embedding": "audio_tokens.agg",
    r"unified_vat_transformer/txt_agg_embedding": "text_tokens.agg",
    r"unified_vat_transformer/voxel_to_patch/(kernel|bias)": r"video_tokens.project.\1",
    r"unified_vat_transformer/waveform_to_patch/(kernel|bias)": r"audio_tokens.project.\1",
    r"unified_vat_transformer/text_embedding\w*/embeddings": "text_tokens.table.weight",
    r"unified_vat_transformer/(video|audio|text)_pre_tx_projection/(kernel|bias)": (
        r"\1_tokens.pre_proj.\2"
    ),
    r"unified_vat_transformer/(video|audio|text)_post_tx_projection/(kernel|bias)": (
        r"post_proj.\1.\2"
    ),
    **_under(
        "unified_vat_transformer/video_spatio_temporal_embeddings/", "video_tokens.", _POSITION
    ),
    **_under("unified_vat_transformer/audio_temporal_embeddings/", "audio_tokens.", _POSITION),
    **_under("unified_vat_transformer/text_temporal_embeddings/", "text_tokens.", _POSITION),
    **_under("unified_vat_transformer/transformer/", "trunk.", _ENCODER),
    r"mlp_fac_head/vid_to_hid/kernel": "common_space.video_hidden.kernel",
    r"mlp_fac_head/hid_to_va/linear_projection/kernel": "common_space.video_va.kernel",
    r"mlp_fac_head/va_to_vat/linear_projection/kernel": "common_space.video_vt.kernel",
    r"mlp_fac_head/aud_to_vid/(kernel|bias)": r"common_space.audio_va.\1",
    r"mlp_fac_head/txt_to_vid/(kernel|bias)": r"common_space.text_vt.\1",
    r"mlp_fac_head/va_to_vat/batch_norm/(\w+)": r"common_space.video_vt_norm.\1",
    # twice under one name: first after vid_to_hid, then after linear_projection
    r"mlp_fac_head/hid_to_va/batch_norm/(\w+)#0": r"common_space.video_hidden_norm.\1",
    r"mlp_fac_head/hid_to_va/batch_norm/(\w+)#1": r"common_space.video_va_norm.\1",
}
_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@lru_cache(1)
def recording() -> dict[str, np.ndarray]:
    path = os.environ.get("VATT_ORACLE") or Path(__file__).parent / "oracle.npz"
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def array(key: str) -> torch.Tensor:
    return torch.from_numpy(recording()[key])


def our_tensors(prefix: str) -> dict[str, torch.Tensor]:
    """Recorded weights, gradients or statistics under the names of our state dict.

    In the recording they are ``{prefix}/{index}|{name}``.
    """
    ours: dict[str, torch.Tensor] = {}
    packed: dict[str, dict[str, torch.Tensor]] = {}
    seen: dict[str, int] = {}
    for key in sorted(k for k in recording() if k.startswith(prefix + "/")):
        name = _our_name(key, seen)
        value = array(key)
        if name.endswith(".kernel"):  # Dense (in, out), Conv (t, h, w, c, out) -> Linear (out, in)
            name, value = (
                name.removesuffix("kernel") + "weight",
                value.reshape(-1, value.shape[-1]).T,
            )
        if match := re.fullmatch(r"(.*)\.([qkv])\.(\w+)", name):
            packed.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            assert name not in ours, name
            ours[name] = value.clone()
    return ours | {name: torch.cat([parts[p] for p in "qkv"]) for name, parts in packed.items()}


def _our_name(key: str, seen: dict[str, int]) -> str:
    released = re.search(
        r"(?:vi_tx_3d|au_tx_1d|text_module|unified_vat_transformer|mlp_fac_head)/.*(?=:0$)", key
    )
    assert released, key
    name = released[0]
    if "hid_to_va/batch_norm" in name:
        seen[name] = seen.get(name, -1) + 1
        name += f"#{seen[name]}"
    for pattern, ours in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            head, dot, leaf = match.expand(ours).rpartition(".")
            return head + dot + _LEAVES.get(leaf, leaf)
    raise AssertionError(f"no name of ours for {key}")


def _tower(sizes: dict) -> TowerConfig:
    return TowerConfig(
        depth=sizes["num_layers"],
        dim=sizes["d_model"],
        mlp_dim=sizes["d_ff"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["d_kv"],
    )


def _common(sizes: dict) -> dict:
    head = sizes["H"]
    return dict(
        d_va=head["va"],
        d_vt=head["vt"],
        batch_norm_momentum=1 - head["bn_momentum"],
        batch_norm_eps=head["bn_eps"],
        heads="released",
        nce_form="released",
        va_weight=0.5,
        vt_weight=0.5,
        train_words=False,
    )


@lru_cache(1)
def specific_config() -> VATTConfig:
    sizes = json.loads(str(recording()["config_json"]))
    v, a, t = sizes["V"], sizes["A"], sizes["T"]
    patch, spatial = v["temporal_patch_size"], v["spatial_patch_size"]
    return VATTConfig(
        video=_tower(v),
        audio=_tower(a),
        text=_tower(t),
        frames=patch * v["max_temporal_buckets"],
        height=spatial * v["max_vertical_buckets"],
        width=spatial * v["max_horizontal_buckets"],
        video_patch=(patch, spatial, spatial),
        samples=a["temporal_patch_size"] * a["max_temporal_buckets"],
        audio_patch=a["temporal_patch_size"],
        words=recording()["text/ids"].shape[1],
        texts_per_clip=1,
        vocab_size=t["vocab_size"],
        word_dim=t["d_embedding"],
        relative_buckets=t["num_relative_buckets"],
        relative_max_distance=t["max_relative_distance"],
        **_common(sizes),
    )


@lru_cache(1)
def agnostic_config() -> VATTConfig:
    sizes = json.loads(str(recording()["config_json"]))
    u = sizes["U"]
    patch, spatial = u["vid_temporal_patch_size"], u["vid_spatial_patch_size"]
    side = spatial * u["max_vid_spatial_buckets"]
    return VATTConfig(
        kind="modality_agnostic",
        video=_tower(u),
        audio=_tower(u),
        text=_tower(u),
        frames=patch * u["max_vid_temporal_buckets"],
        height=side,
        width=side,
        video_patch=(patch, spatial, spatial),
        samples=u["aud_temporal_patch_size"] * u["max_aud_temporal_buckets"],
        audio_patch=u["aud_temporal_patch_size"],
        words=u["max_txt_temporal_buckets"],
        texts_per_clip=1,
        vocab_size=u["txt_vocab_size"],
        word_dim=u["txt_embedding_dim"],
        post_proj_dim=u["d_post_proj"],
        **_common(sizes),
    )


# -- checks ----------------------------------------------------------------------------------------

# max error / max value to expect in fp32
TOWERS, RESAMPLED, EMBEDDINGS, GRADIENTS = 5e-6, 4e-3, 1e-5, 1e-4
CONFIGS = {"tx_fac": specific_config, "ut_fac": agnostic_config}
INPUTS = ("v_va", "v_vt", "a_va", "t_vt")


def assert_agrees(ours: torch.Tensor, key: str, tolerance: float) -> None:
    recorded = array(key)
    ours = ours.detach().reshape(recorded.shape)
    error = (ours - recorded).abs().max() / recorded.abs().max()
    assert error <= tolerance, f"{key}: max error / max value {error:.1e} > {tolerance:.0e}"


def model_with(config, prefix: str) -> VATT:
    """A model whose recorded module holds the recording's weights; the rest stays random."""
    model = VATT(config).eval()
    result = model.load_state_dict(our_tensors(f"{prefix}/w"), strict=False)
    assert not result.unexpected_keys
    return model


def loss_cases():
    for form, ours in (("asym", "released"), ("sym", "symmetric")):
        for masked in (0, 1):
            yield form, ours, masked


def check_losses(world: int, results: list[dict]) -> None:
    for (form, _, masked), parts in zip(loss_cases(), results, strict=True):
        key = f"loss/{form}_mask{masked}_rep{world}"
        for name in ("vidaud", "vidtxt", "per_replica"):
            torch.testing.assert_close(
                torch.stack([p[name] for p in parts]).double(),
                array(f"{key}/{name}"),
                rtol=0,
                atol=1e-5,
                msg=f"{key}/{name}",
            )
        for name in INPUTS:
            assert_agrees(
                torch.cat([p[f"grad_{name}"] for p in parts]), f"{key}/grad_{name}", GRADIENTS
            )


def amplified_noise(model, out, name: str) -> float:
    """What fp32 rounding of the pooled vectors becomes behind batch norms over so few clips.

    The rounding is 1e-6, half the towers' usual error.
    """
    heads, generator = copy.deepcopy(model.common_space).double(), torch.Generator().manual_seed(0)

    def embeddings(noise: float) -> dict[str, torch.Tensor]:
        exact = {
            m: getattr(out, f"{m}_pooled").detach().double().flatten(0, -2)
            for m in ("video", "audio", "text")
        }
        x = {
            m: v + noise * v.abs().max() * torch.randn(v.shape, dtype=v.dtype, generator=generator)
            for m, v in exact.items()
        }
        z_video_va, z_video_vt = heads.video(x["video"])
        return {
            "z_video_va": z_video_va,
            "z_video_vt": z_video_vt,
            "z_audio_va": heads.audio(x["audio"]),
            "z_text_vt": heads.text(x["text"]),
        }

    exact, noisy = embeddings(0.0)[name], embeddings(1e-6)[name]
    return ((noisy - exact).abs().max() / exact.abs().max()).item()
