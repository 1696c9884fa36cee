"""A model of ours under the released checkpoints' keys: the converter's inverse, written apart.

The keys are those of the recorded checkpoints (tests/support/tiny_ckpt_*); fine-tuned ones follow
the attributes of google-research/vatt's VideoModel and AudioModel.
"""

import re

import torch
from torch import Tensor

from vatt_fast.config import VATTConfig
from vatt_fast.model import VATT

ROOT = "model/layer_with_weights-0/"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"

# ours, with the leaf "weight" of a product as "kernel" -> theirs
_TX = {
    r"blocks\.(\d+)\.attention_norm\.": r"layers/\1/layer_norm/",
    r"blocks\.(\d+)\.([qkv])\.": r"layers/\1/mha/\2/",
    r"blocks\.(\d+)\.out\.": r"layers/\1/mha/o/",
    r"blocks\.(\d+)\.mlp_norm\.": r"layers/\1/feed_forward/layer_norm/",
    r"blocks\.(\d+)\.mlp_in\.": r"layers/\1/feed_forward/mlp/wi/",
    r"blocks\.(\d+)\.mlp_out\.": r"layers/\1/feed_forward/mlp/wo/",
    r"norm\.": r"final_layer_norm/",
}
_T5 = {
    r"blocks\.(\d+)\.attention_norm\.gamma": r"layers/\1/self_attention/layer_norm/weight",
    r"blocks\.(\d+)\.([qkv])\.": r"layers/\1/self_attention/attention/\2/",
    r"blocks\.(\d+)\.out\.": r"layers/\1/self_attention/attention/o/",
    r"relative_bias": "layers/0/self_attention/attention/relative_attention_bias/embeddings",
    r"norm\.gamma": r"final_layer_norm/weight",
}
_T5 |= {ours: theirs for ours, theirs in _TX.items() if ours not in _T5}
_HEADS = {
    r"video_hidden\.": "vid_to_hid/",
    r"video_hidden_norm\.": "hid_to_va/pre_bn/",
    r"video_va\.": "hid_to_va/dense/",
    r"video_va_norm\.": "hid_to_va/bn/",
    r"audio_va\.": "aud_to_va/",
    r"video_vt\.": "va_to_vat/dense/",
    r"video_vt_norm\.": "va_to_vat/bn/",
    r"text_vt\.": "txt_to_vat/",
}
_LEAVES = {
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
    "bias": "beta",
    "weight": "gamma",
}
_AXES = ("temporal", "vertical", "horizontal")
_SHORT = {"video": "vid", "audio": "aud", "text": "txt"}


def released_keys(config: VATTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the released keys, in the released shapes; of a pre-trained model."""
    return {
        f"{ROOT}{_pretrained(name, config)}{VALUE}": value.contiguous()
        for name, value in _unpacked(config, tensors).items()
        if name != "log_scale"
    }


def fine_tuned_keys(config: VATTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of a tower and its ``classifier``."""
    return {
        f"{ROOT}{_fine_tuned(name)}{VALUE}": value.contiguous()
        for name, value in _unpacked(config, tensors).items()
    }


def random_model(config: VATTConfig, seed: int = 0) -> VATT:
    """Also its norms and statistics are random."""
    torch.manual_seed(seed)
    model = VATT(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1:
                value.uniform_(0.5, 1.5)
            elif name == "text_encoder.relative_bias":
                value.normal_()
    return model


def with_bookkeeping(tensors: dict) -> dict:
    """What training adds: slots, settings, counters, the object graph."""
    slots = {
        key.replace(VALUE, f"/.OPTIMIZER_SLOT/optimizer/{slot}{VALUE}"): value
        for key, value in tensors.items()
        for slot in ("m", "v", "vhat")
        if key.endswith(VALUE) and "moving" not in key
    }
    settings = {f"optimizer/{name}{VALUE}": torch.ones(()) for name in ("beta_1", "learning_rate")}
    counters = {f"optimizer/iter{VALUE}": torch.tensor(5), f"save_counter{VALUE}": torch.tensor(1)}
    graph = {"_CHECKPOINTABLE_OBJECT_GRAPH": [b"graph"]}
    return {**tensors, **slots, **settings, **counters, **graph}


def arrays(tensors: dict) -> dict:
    """As ``tf_bundle_writer`` takes them."""
    return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in tensors.items()}


def _unpacked(config: VATTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v apart, products as kernels in the released layout, norms' leaves renamed."""
    found = {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".qkv"):
            for each, part in zip("qkv", value.chunk(3), strict=True):
                at = f"{stem.removesuffix('qkv')}{each}"
                found |= {f"{at}.kernel": part.T} if leaf == "weight" else {f"{at}.bias": part}
        elif leaf == "weight" and value.ndim == 2 and stem != "text_tokens.table":
            kernel = value.T
            if stem == "video_tokens.project":
                kernel = kernel.reshape(*config.video_patch, 3, -1)
            elif stem == "audio_tokens.project":
                kernel = kernel.reshape(config.audio_patch, 1, -1)
            found[f"{stem}.kernel"] = kernel
        elif "norm" in stem.rpartition(".")[2]:
            found[f"{stem}.{_LEAVES[leaf]}"] = value
        else:
            found[name] = value
    return found


def _pretrained(name: str, config: VATTConfig) -> str:
    part, _, rest = name.partition(".")
    if part == "common_space":
        return "_head_layer/_bridge_heads/0/" + _renamed(rest, _HEADS)
    base = "_base_layer/"
    trunk = f"{base}unified_backbone/unified_transformer/"
    if part == "trunk":
        return f"{trunk}tx/{_renamed(rest, _TX)}"
    if part == "post_proj":
        return f"{trunk}{name.replace('.', '/')}"
    modality, _, kind = part.partition("_")
    if config.agnostic:
        leaf = rest.replace(".", "/")
        return trunk + {
            "agg": f"{_SHORT[modality]}_agg_embedding",
            "table/weight": f"raw_to_embeddings/{modality}/embeddings",
        }.get(leaf, _tokens(rest, f"/{modality}").replace("project", "raw_to_embeddings"))
    at = f"{base}{_SHORT[modality]}_backbone/"
    if modality == "text":
        if kind == "encoder":
            return f"{at}base_lm/{_renamed(rest, _T5)}"
        return at + {"agg": "agg_embedding", "table.weight": "embedding/embeddings"}.get(
            rest, rest.replace(".", "/")
        )
    return f"{at}{_tower(modality, kind, rest)}"


def _fine_tuned(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "classifier":
        return f"_ops/cls/{rest}"
    if part == "trunk":
        return f"_base/tx/{_renamed(rest, _TX)}"
    if part == "post_proj":
        return f"_base/post_proj/{rest.partition('.')[2]}"
    modality, _, kind = part.partition("_")
    return _tower(modality, kind, rest)


def _tower(modality: str, kind: str, rest: str) -> str:
    if kind == "encoder":
        return f"_base/tx/{_renamed(rest, _TX)}"
    project = {"video": "voxel_to_patch", "audio": "wave_to_patch"}[modality]
    if rest == "agg":
        return "_base/agg_embedding"
    return "_base/" + _tokens(rest, "").replace("project", project)


def _tokens(rest: str, modality: str) -> str:
    if found := re.fullmatch(r"position\.tables\.(\d)", rest):
        axis = _AXES[int(found[1])]
        return f"pos_embedding_lookup{modality}/{axis}_position_embeddings/embeddings"
    if rest.startswith("position.norm."):
        return f"pos_embedding_lookup{modality}/layernorm/{rest.rpartition('.')[2]}"
    stem, _, leaf = rest.rpartition(".")
    return f"{stem}{modality}/{leaf}"


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if found := re.match(ours, name):
            return found.expand(theirs) + name[found.end() :].replace(".", "/")
    raise AssertionError(name)
