"""The verbs that bring weights from one format into another."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..checkpoints.convert import convert
from ..files import check_folder, only_writer, remove_litter
from ..integrations.export import export
from ..training.checkpoint import CHECKPOINT
from ..training.shards import join_shards
from .printing import print_report


def join(run: Annotated[str, tyro.conf.Positional]) -> None:
    """Make one file of the shards of an interrupted run (strategy fsdp2), and its model's files.

    A run that ends does so itself; one that is continued reads either.

    Args:
        run: run folder.
    """
    folder = Path(run)
    check_folder(folder)
    step = None
    if folder.is_dir():
        with only_writer(folder):
            remove_litter(folder)
            step = join_shards(folder)
    if step is None:
        raise ValueError(f"{run}: nothing lies in shards there")
    print(f"checkpoint of step {step}: {folder / CHECKPOINT}")


def convert_checkpoint(
    checkpoint: str,
    out: str,
    words: str | None = None,
    labels: str | None = None,
    head_dim: str | None = None,
    partial: bool = False,
    json: bool = False,
) -> None:
    """Turn a released TensorFlow checkpoint into a folder that torch and JAX load.

    Args:
        checkpoint: what stands before .index, such as tx_fac_mbs/ckpt-500000.
        out: folder to write: config.json, model.safetensors, vocabulary.txt or labels.txt.
        words: word list of the text tower (misc/howto100m_en.txt), so that encode takes sentences.
        labels: names of a fine-tuned checkpoint's classes, one a line in their order.
        head_dim: size of an attention head, where neither the shapes nor the published sizes tell:
            64, or video=64,audio=32.
        partial: go on where keys don't match; weights that are not there are random.
        json: print JSON.
    """
    heads = None if head_dim is None else _head_dim(head_dim)
    found = convert(checkpoint, out, words=words, labels=labels, head_dim=heads, partial=partial)
    if not json:
        for name in ("not matched", "notes"):
            for line in found.pop(name, ()):
                print(f"vatt-fast: {line}", file=sys.stderr)
    print_report(found | {"written": out}, json)


def export_model(
    model: str,
    out: str,
    format: Literal["onnx", "pt2"] = "onnx",
    modalities: tuple[str, ...] = (),
) -> None:
    """Write each tower as a file that runs without this package, for batches of any size.

    Args:
        model: saved model, run folder, classifier's folder, preset, or released checkpoint.
        out: folder for video.onnx and so on, with vocabulary.txt or labels.txt.
        format: onnx, for ONNX Runtime and others; pt2, for torch.export.load.
        modalities: of video, audio and text; by default all that the model has.
    """
    for path in export(model, out, format=format, modalities=modalities):
        print(f"written, and equal to the model: {path}")


def _head_dim(text: str) -> int | dict[str, int]:
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.split("=") for part in text.split(","))
        return {modality.strip(): int(size) for modality, size in pairs}
    except ValueError as error:
        raise ValueError(
            f"--head-dim is {text!r}; it is a number, or one each: video=64,audio=32"
        ) from error
