"""Models on disk: config.json, model.safetensors and vocabulary.txt in one folder.

Loading never unpickles.
"""

import contextlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import VATTConfig
from .data.text import Vocabulary
from .files import replacing, write_text
from .positions import resample_matrix

if TYPE_CHECKING:
    from .model import VATT

Config = TypeVar("Config")
CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "vocabulary.txt"
SHARDS = "shards_"  # and a step: a run's checkpoint that is not joined yet


def save_model(model: "VATT", folder: str | Path) -> None:
    """Write the model's files, each whole or not at all. Raises OSError, naming the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(model.state_dict(), folder / WEIGHTS)
    save_description(model, folder)


def save_description(model: "VATT", folder: Path) -> None:
    """Write the model's files but its weights, each whole or not at all. Raises OSError."""
    write_text(folder / CONFIG, model.config.to_json() + "\n")
    if model.vocabulary is not None:
        model.vocabulary.save(folder / VOCABULARY)


def read_folder(folder: str | Path) -> tuple[VATTConfig, dict[str, Tensor], Vocabulary | None]:
    """What ``save_model`` wrote. Raises ValueError for a file that is missing or damaged."""
    config, tensors = read_saved(folder, _vatt_config, written_by="save_pretrained or pretrain")
    words = Path(folder) / VOCABULARY
    return config, tensors, Vocabulary.load(words) if words.is_file() else None


def _vatt_config(text: str) -> VATTConfig:
    if is_classifier(text):
        raise ValueError(
            "it is a classifier's; load it with vatt_fast.classifier.Classifier.from_pretrained"
        )
    return VATTConfig.from_json(_own_part(text))


def read_saved(
    folder: str | Path, from_json: Callable[[str], Config], written_by: str
) -> tuple[Config, dict[str, Tensor]]:
    """Config and tensors of a saved model. Raises ValueError for a file missing or damaged.

    Args:
        from_json: the config of a text; raises ValueError or TypeError for another one.
        written_by: what writes such a folder, for the error.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            told = f"it must be a folder written by {written_by}"
            if next(folder.glob(f"{SHARDS}*"), None) is not None:
                told = f"its checkpoint lies in shards: vatt-fast join {folder} makes one file"
            raise ValueError(f"{folder} has no {name}; {told}")
    try:
        config = from_json((folder / CONFIG).read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return config, load_tensors(folder / WEIGHTS)


def _own_part(config: str) -> str:
    """A config.json, or our part of one that ``integrations.transformers_model`` wrote."""
    with contextlib.suppress(ValueError):  # no JSON is told by who reads it
        values = json.loads(config)
        if isinstance(values, dict) and values.get("model_type") == "vatt" and "vatt" in values:
            return json.dumps(values["vatt"])
    return config


def is_classifier(config: str) -> bool:
    """Whether this is the config.json of a fine-tuned tower with its classifier."""
    try:
        values = json.loads(config)
    except ValueError:
        return False
    return isinstance(values, dict) and "num_classes" in values


def load_weights(model: torch.nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Copy ``tensors`` into ``model``.

    Raises ValueError where names or shapes differ; then nothing is copied.
    """
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the config asks for {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{source} does not fit the config: {'; '.join(problems[:3])}{more}; "
            "use the config.json it was saved with"
        )
    model.load_state_dict(tensors)


def resampled(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, with position tables as long as those of ``wanted``, a state dict."""
    found = dict(tensors)
    for name, table in tensors.items():
        if ".position.tables." in name and len(table) != len(wanted[name]):
            matrix = torch.from_numpy(resample_matrix(len(table), len(wanted[name])))
            found[name] = (matrix @ table.double()).to(table.dtype)
    return found


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write safetensors.

    ``path`` is either the old file or the whole new one, whenever the process dies.

    Raises:
        OSError: it could not be written, and is as it was.
    """
    with replacing(path) as part:
        try:
            save_file(
                {name: value.detach().contiguous() for name, value in tensors.items()},
                part,
                metadata=metadata,
            )
        except SafetensorError as error:  # of the file system: the tensors are sound
            raise OSError(str(error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors. Raises ValueError for a file that is cut short or of another kind."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); "
            "it was cut short or damaged: save it again"
        ) from error


def load_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file (8 bytes of header length, then a JSON header)."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__", {})
