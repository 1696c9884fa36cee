"""The JAX model's weights: saved folders, and names and shapes beside the torch model's.

``params`` holds the weights under their names in model.safetensors, a module's parameters below its
name, with two differences. Attention's weights are split by head, so that no layout copy surrounds
the kernel and no axis shorter than a TPU's lanes comes last:

    ....qkv.weight (3 * H * D, dim)  ->  ....q.weight, ....k.weight, ....v.weight (H, D, dim)
    ....qkv.bias   (3 * H * D,)      ->  ....q.bias, ....k.bias, ....v.bias (H, D)
    ....out.weight (dim, H * D)      ->  ....out.weight (H, D, dim)

And the blocks of an encoder are stacked, so that they are compiled once, as the body of a loop. The
last one stands alone, because it may be asked for AGG only:

    ....blocks.0 ... ....blocks.10  ->  ....blocks, with a leading axis of 11
    ....blocks.11                   ->  ....last
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..config import MODALITIES, TowerConfig, VATTConfig
from ..data.text import Vocabulary
from ..model import VATT, create_model
from ..weights import save_model

Arrays = dict[str, jax.Array]


def trainable(name: str, config: VATTConfig) -> bool:
    """Whether training changes the parameter of that name."""
    return {
        "log_scale": config.learn_temperature,
        "text_tokens.table.weight": config.train_words,
    }.get(name, True)


def load(name: str | Path) -> tuple[VATTConfig, Arrays, Arrays]:
    """Config, params and statistics of a saved folder, or of a preset with random weights.

    See ``create_model`` for the names.
    """
    model = create_model(name)
    return model.config, *from_torch(model)


def save(
    folder: str | Path,
    config: VATTConfig,
    params: Arrays,
    statistics: Arrays,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write the folder that ``VATT.from_pretrained`` and ``load`` read."""
    save_model(to_torch(config, params, statistics, vocabulary), folder)


def from_torch(model: VATT) -> tuple[Arrays, Arrays]:
    """The params and statistics of a torch model, copied to JAX's default device."""
    params, statistics = jax.tree.map(jnp.array, on_host(model))
    return params, statistics


def on_host(model: VATT) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The params and statistics of a torch model in NumPy arrays, which may share its memory."""
    arrays = {
        name: value.numpy(force=True)
        for name, value in rearrange(model.state_dict(), model.config).items()
    }
    return _without_statistics(arrays)


def to_torch(
    config: VATTConfig, params: Arrays, statistics: Arrays, vocabulary: Vocabulary | None = None
) -> VATT:
    """The torch model with these weights, copied, in evaluation mode on the CPU."""
    with torch.device("meta"):
        model = VATT(config)
    model.load_state_dict(restore(as_tensors(params | statistics), config), assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name, config))
    model.vocabulary = vocabulary
    return model.eval()


def shapes(
    config: VATTConfig, dtype=jnp.float32
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of the params and statistics, without allocating them."""
    with torch.device("meta"):
        tensors = rearrange(VATT(config).state_dict(), config)
    return _without_statistics(
        {name: jax.ShapeDtypeStruct(tuple(value.shape), dtype) for name, value in tensors.items()}
    )


def as_tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Copies on the CPU in fp32 at least, under the same names."""
    return {
        name: torch.from_numpy(np.array(value.astype(jnp.promote_types(value.dtype, jnp.float32))))
        for name, value in jax.device_get(arrays).items()
    }


def rearrange(tensors: dict[str, torch.Tensor], config: VATTConfig) -> dict[str, torch.Tensor]:
    """The state dict's names and shapes -> ours; of gradients and Adam's moments too.

    Of each encoder all blocks, or none.
    """
    towers = _towers(config)
    ours: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in _split_heads(tensors, towers).items():
        if found := _BLOCK.fullmatch(name):
            tower, i, below = found.groups()
            if int(i) < towers[tower].depth - 1:
                stacks.setdefault(f"{tower}.blocks.{below}", {})[int(i)] = value
            else:
                ours[f"{tower}.last.{below}"] = value
        else:
            ours[name] = value
    return ours | {
        name: torch.stack([values[i] for i in range(len(values))])
        for name, values in stacks.items()
    }


def restore(tensors: dict[str, torch.Tensor], config: VATTConfig) -> dict[str, torch.Tensor]:
    """Inverse of ``rearrange``."""
    towers = _towers(config)
    theirs: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        tower, _, below = name.partition(".")
        if below.startswith("blocks."):
            theirs |= {
                f"{tower}.blocks.{i}.{below.removeprefix('blocks.')}": one
                for i, one in enumerate(value)
            }
        elif below.startswith("last."):
            theirs[f"{tower}.blocks.{towers[tower].depth - 1}.{below.removeprefix('last.')}"] = (
                value
            )
        else:
            theirs[name] = value
    return _join_heads(theirs)


def is_stacked(name: str) -> bool:
    """Whether the parameter of that name has a leading axis of blocks."""
    return ".blocks." in name


def _towers(config: VATTConfig) -> dict[str, TowerConfig]:
    return {f"{modality}_encoder": getattr(config, modality) for modality in MODALITIES} | {
        "trunk": config.video
    }


_BLOCK = re.compile(r"(\w+)\.blocks\.(\d+)\.(.*)")


def _split_heads(
    tensors: dict[str, torch.Tensor], towers: dict[str, TowerConfig]
) -> dict[str, torch.Tensor]:
    ours: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        tower = towers.get(name.partition(".")[0])
        stem, _, leaf = name.rpartition(".")
        if tower and stem.endswith(".qkv"):
            heads = value.reshape(3, tower.num_heads, tower.head_dim, *value.shape[1:])
            ours |= {
                f"{stem.removesuffix('qkv')}{each}.{leaf}": heads[i] for i, each in enumerate("qkv")
            }
        elif tower and name.endswith(".out.weight"):
            ours[name] = value.T.reshape(tower.num_heads, tower.head_dim, value.shape[0])
        else:
            ours[name] = value
    return ours


def _join_heads(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    theirs: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".q"):
            stem = stem.removesuffix("q")
            theirs[f"{stem}qkv.{leaf}"] = torch.cat(
                [tensors[f"{stem}{each}.{leaf}"].flatten(0, 1) for each in "qkv"]
            )
        elif name.endswith(".out.weight"):
            theirs[name] = value.flatten(0, 1).T.contiguous()
        elif not stem.endswith((".k", ".v")):
            theirs[name] = value
    return theirs


def _without_statistics(arrays: dict) -> tuple[dict, dict]:
    statistics = {
        name: value
        for name, value in arrays.items()
        if name.endswith((".running_mean", ".running_var"))
    }
    return {name: value for name, value in arrays.items() if name not in statistics}, statistics
