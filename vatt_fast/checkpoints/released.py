"""Released VATT checkpoints, read as configs and tensors of ours.

Each key has one place here and each weight one key, or the checkpoint is refused with what is left
over.
"""

import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import VATTConfig
from ..data.text import Vocabulary
from .bundle import CHECKS_TENSORS, Bundle, Entry
from .layouts import HeadDim, Layout, Shapes, layout_of
from .names import WORD_TABLE, Weight
from .words import read_word_list, unknown_second

_SUFFIX, _SLOT, _GRAPH = (
    "/.ATTRIBUTES/VARIABLE_VALUE",
    "/.OPTIMIZER_SLOT/",
    "_CHECKPOINTABLE_OBJECT_GRAPH",
)
_STEPS = ("save_counter", "global_step", "step", "iter", "iterations", "epoch")
# an optimizer that keeps its slots under its own name (Keras 2.11 and later) is told by these
_OF_OPTIMIZERS = ("learning_rate", "_learning_rate", "iter", "iterations", "_iterations")
_NAMED = 5  # keys in an error


@dataclass(frozen=True)
class Mismatch:
    """Keys that the model asks for and that are not there, keys without a place, other shapes."""

    missing: list[str]
    unused: list[str]
    differing: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unused or self.differing)

    def lines(self) -> list[str]:
        return [
            *(f"missing: {key}" for key in self.missing),
            *(f"no place here: {key}" for key in self.unused),
            *(f"{key} {what}" for key, what in self.differing.items()),
        ]


@dataclass
class Released:
    """A checkpoint under our names, fp32.

    ``left_out`` counts what no model needs: optimizer slots, counters, metrics. ``mismatch`` is
    empty unless ``partial`` was asked for; weights without a tensor are then not in ``tensors``.
    """

    config: VATTConfig
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary | None
    modality: str | None
    num_classes: int | None
    left_out: dict[str, int]
    mismatch: Mismatch
    notes: list[str]


def read_released(
    prefix: str | os.PathLike,
    *,
    words: str | os.PathLike | None = None,
    head_dim: HeadDim | None = None,
    partial: bool = False,
) -> Released:
    """Read a released checkpoint.

    Args:
        prefix: what stands before ``.index``, such as ``tx_fac_mbs/ckpt-500000``.
        words: the text tower's word list, see ``words.read_word_list``. It becomes the vocabulary;
            the word table's rows follow its order, ``<unk>`` second.
        head_dim: size of an attention head, or {"video": size, "audio": size}: shapes of those two
            don't tell. By default 64, as published, where the sizes are published ones; else, with
            a note, the text tower's; else 64, with a note, where the widths are published ones.
        partial: go on where keys or shapes don't match.

    Raises:
        ValueError: a file is missing or damaged, it holds no VATT, keys or shapes don't match
            (the message lists them), or the heads cannot be told.
    """
    bundle = Bundle(prefix)
    shapes = {
        key.removesuffix(_SUFFIX): entry.shape
        for key, entry in bundle.entries.items()
        if _SLOT not in key and key != _GRAPH
    }
    word_list = None if words is None else read_word_list(words)
    num_words = None if word_list is None else len(word_list)
    layout = layout_of(shapes, head_dim=head_dim, num_words=num_words, source=bundle.prefix)
    left_out = _bookkeeping(bundle, layout)
    mismatch = _compare(layout.weights, shapes, left_out)
    if mismatch and not partial:
        raise ValueError(_refusal(bundle.prefix, mismatch))
    tensors = _read(bundle, layout.weights, {*mismatch.missing, *mismatch.differing})
    if layout.modality is None:  # fixed in the released loss, which has no variable for it
        tensors["log_scale"] = torch.tensor(-math.log(layout.config.temperature))
    notes, vocabulary = list(layout.notes), None
    if word_list is not None:
        if layout.modality is not None:
            raise ValueError(f"{bundle.prefix} has no text tower, so it has no use for {words}")
        rows = layout.config.vocab_size
        vocabulary, order = unknown_second(word_list, rows=rows, source=str(words))
        if more := rows - len(word_list):
            notes.append(
                f"{words} has {len(word_list)} words for {rows} rows; taken as the table's first: "
                f"{', '.join(vocabulary.words[:more])}"
            )
        if WORD_TABLE in tensors:
            tensors[WORD_TABLE] = tensors[WORD_TABLE][order]
    if not CHECKS_TENSORS:
        notes.append("checksums of tensors are not compared: google-crc32c is not installed")
    return Released(
        layout.config,
        tensors,
        vocabulary,
        layout.modality,
        layout.num_classes,
        dict(Counter(left_out.values())),
        mismatch,
        notes,
    )


# -- matching --------------------------------------------------------------------------------------


def _bookkeeping(bundle: Bundle, layout: Layout) -> dict[str, str]:
    """What training keeps beside the weights: of which kind, by key without its suffix."""
    weights = {weight.key for weight in layout.weights}
    optimizers = _optimizers(bundle, layout.root)
    found = {}
    for key, entry in bundle.entries.items():
        name = key.removesuffix(_SUFFIX)
        if name not in weights and (kind := _kind(name, entry, layout, optimizers)):
            found[name] = kind
    return found


def _optimizers(bundle: Bundle, root: str) -> set[str]:
    """Where optimizers lie: named behind their slots, or they hold a rate and a step."""
    found = {"optimizer"}
    for key, entry in bundle.entries.items():
        _, slot, behind = key.removesuffix(_SUFFIX).partition(_SLOT)
        at, _, name = (behind or key.removesuffix(_SUFFIX)).rpartition("/")
        if at and (slot or (entry.shape == () and name in _OF_OPTIMIZERS)):
            found.add(at)
    return {at for at in found if not root.startswith(f"{at}/")}


def _kind(name: str, entry: Entry, layout: Layout, optimizers: set[str]) -> str | None:
    """None for a weight."""
    parts = name.split("/")
    if name == _GRAPH:
        return "object graph"
    if _SLOT in name:
        return "optimizer slots"
    if "optimizer" in parts or any(name.startswith(f"{at}/") for at in optimizers):
        return "optimizer settings"
    if parts[-1] in _STEPS:
        return "step counters"
    if "metrics" in parts or "keras_api" in parts:
        return "metrics"
    if not entry.is_float:
        return "integers and texts"
    if entry.shape == () and not layout.holds(name):
        return "scalars outside the model"
    return None


def _compare(weights: list[Weight], shapes: Shapes, left_out: Collection[str]) -> Mismatch:
    places = {weight.key: weight.shape for weight in weights}
    return Mismatch(
        missing=[key for key in places if key not in shapes],
        unused=[key for key in shapes if key not in places and key not in left_out],
        differing={
            key: f"has shape {shapes[key]}, the others ask for {shape}"
            for key, shape in places.items()
            if key in shapes and shapes[key] != shape
        },
    )


def _refusal(source: str, mismatch: Mismatch) -> str:
    lines = mismatch.lines()
    more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return (
        f"{source} is not matched key by key: {'; '.join(lines[:_NAMED])}{more} "
        "(convert --partial goes on without them and lists them all)"
    )


def _read(bundle: Bundle, weights: list[Weight], skip: set[str]) -> dict[str, Tensor]:
    """Our tensors; a weight that lacks one of its parts is left out."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for weight in weights:
        if weight.key in skip:
            continue
        key = weight.key if weight.key in bundle.entries else weight.key + _SUFFIX
        value = bundle.tensor(key).float()
        if not value.isfinite().all():
            raise ValueError(
                f"{bundle.prefix}: {weight.key} holds values that are not finite; the file is "
                "damaged, or its training diverged"
            )
        if weight.key.endswith("/kernel"):
            value = value.reshape(-1, value.shape[-1]).T.contiguous()
        if weight.part is None:
            tensors[weight.name] = value
        else:
            parts.setdefault(weight.name, {})[weight.part] = value
    return tensors | {
        name: torch.cat([found[i] for i in range(3)])
        for name, found in parts.items()
        if len(found) == 3
    }
