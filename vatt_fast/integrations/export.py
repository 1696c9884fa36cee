"""Towers as files that run without this package: torch.export's .pt2, and ONNX.

    from vatt_fast.integrations.export import export

    export("runs/demo", "exported", format="onnx")   # video.onnx, audio.onnx, text.onnx

What is exported computes each op in torch's own ops (``plain.py``), in fp32, for batches of any
size and clips of the model's. ``vatt-fast export`` is the same.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.bundle import is_checkpoint
from ..checkpoints.convert import model_of
from ..checkpoints.released import read_released
from ..classifier import LABELS, Classifier
from ..config import MODALITIES
from ..files import check_folder, replacing, write_text
from ..kernels.settings import use_backend
from ..model import VATT, create_model
from ..weights import CONFIG, VOCABULARY, is_classifier

Format = Literal["pt2", "onnx"]
_NEEDS = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 20
_MOST_BYTES = 2**31 - 2**24  # protobuf's limit, with room for the graph
# relative: what another order of the same fp32 sums may cost, many layers deep
_TOLERANCE = 1e-3

# B clips, T frames, S samples, W words


class Tower(nn.Module):
    """One modality of a model, as a function of one tensor.

    Inputs are video (B, T, H, W, 3) uint8, audio (B, S) float32, or text (B, W) int32 word ids.
    Outputs by name: the embeddings, of unit length as ``VATT.encode`` gives them, and the tower's
    pooled vector; of a classifier its logits.
    """

    def __init__(self, model: VATT | Classifier, modality: str):
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if isinstance(self.model, Classifier):
            return {"logits": self.model(x)}
        out = self.model(**{self.modality: x})
        names = [f"z_{self.modality}_va", f"z_{self.modality}_vt"]
        found = {name: getattr(out, name, None) for name in names}
        unit = {name: F.normalize(z, dim=-1) for name, z in found.items() if z is not None}
        return unit | {f"{self.modality}_pooled": getattr(out, f"{self.modality}_pooled")}

    def example(self, batch: int) -> Tensor:
        """An input at random, of ``batch`` clips."""
        config, rng = self.model.config, np.random.default_rng(0)
        if self.modality == "video":
            size = (batch, config.frames, config.height, config.width, 3)
            return torch.from_numpy(rng.integers(0, 256, size, np.uint8))
        if self.modality == "audio":
            waveform = rng.uniform(-1, 1, (batch, config.samples)).astype(np.float32)
            return torch.from_numpy(waveform)
        ids = rng.integers(1, config.vocab_size, (batch, config.words), np.int32)
        ids[:, config.words // 2 :] = 0
        return torch.from_numpy(ids)


def export(
    model: str | Path | VATT | Classifier,
    out: str | Path,
    *,
    format: Format = "onnx",
    modalities: Sequence[str] = (),
) -> list[Path]:
    """Write each tower as a file of its own, and compare what it computes with the model.

    Args:
        model: a model, or a folder or name that ``create_model`` takes, or a classifier's folder or
            released checkpoint. What had to be assumed of a checkpoint is a warning.
        out: folder for video.onnx, audio.onnx, text.onnx (or .pt2), with vocabulary.txt or
            labels.txt where the model has one.
        format: "pt2" for ``torch.export.load``; "onnx" for ONNX Runtime and others.
        modalities: of the model's; by default all.

    Returns:
        the files.

    Raises:
        ValueError: an unknown format or modality; packages that are missing; a model that the
            format cannot hold; results that differ from the model's.
        OSError: the folder cannot be written.
    """
    if format not in ("pt2", "onnx"):
        raise ValueError(f"format is {format!r}; it is one of pt2, onnx")
    if format == "onnx" and (missing := [n for n in _NEEDS if not importlib.util.find_spec(n)]):
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'vatt_fast[onnx]'")
    net = model if isinstance(model, nn.Module) else _load(model)
    has = (net.settings.modality,) if isinstance(net, Classifier) else MODALITIES
    if unknown := [name for name in modalities if name not in has]:
        raise ValueError(f"the model has no {', '.join(unknown)}; it has {', '.join(has)}")
    wanted = tuple(modalities) or has
    if wide := {str(p.dtype) for p in net.parameters() if p.dtype != torch.float32}:
        raise ValueError(f"the weights are {', '.join(sorted(wide))}; export takes float32")
    size = sum(p.numel() for p in net.parameters()) * 4
    if format == "onnx" and size > _MOST_BYTES:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB of weights, and an ONNX file holds 2; take pt2"
        )
    folder = Path(out)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training = net.training
    net.eval()
    try:
        files = [_write(Tower(net, name).eval(), folder / f"{name}.{format}") for name in wanted]
    finally:
        net.train(training)
    if isinstance(net, VATT) and net.vocabulary is not None and "text" in wanted:
        net.vocabulary.save(folder / VOCABULARY)
    if isinstance(net, Classifier) and net.labels is not None:
        write_text(folder / LABELS, "\n".join(net.labels) + "\n")
    return files


def _load(model: str | Path) -> VATT | Classifier:
    folder = Path(model)
    if not folder.is_dir() and is_checkpoint(model):
        released = read_released(model)
        for note in released.notes:
            warnings.warn(note, stacklevel=3)
        return model_of(released)
    if (folder / CONFIG).is_file() and is_classifier((folder / CONFIG).read_text()):
        return Classifier.from_pretrained(model)
    return create_model(model)


@torch.no_grad()
def _write(tower: Tower, path: Path) -> Path:
    save, run = (_save_pt2, _run_pt2) if path.suffix == ".pt2" else (_save_onnx, _run_onnx)
    again = tower.example(3)
    with use_backend("plain"), _quiet(), replacing(path) as part:
        expected = tower(again)
        try:
            save(tower, list(expected), part)
        except (RuntimeError, NotImplementedError) as error:  # torch's exporters raise these
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path.name} cannot be exported: {reason}") from error
        found = run(part, again)
        for name, value in expected.items():
            apart = float((found[name] - value).norm() / value.norm())
            if not apart <= _TOLERANCE:  # nan too
                raise ValueError(f"{path.name} computes another {name}, by {apart:.1e} of its norm")
    return path


def _save_pt2(tower: Tower, outputs: list[str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(tower, (tower.example(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _save_onnx(tower: Tower, outputs: list[str], path: Path) -> None:
    torch.onnx.export(
        tower,
        (tower.example(2),),
        path,
        dynamo=True,
        opset_version=_OPSET,
        input_names=[tower.modality],
        output_names=outputs,
        dynamic_shapes=({0: "batch"},),
        external_data=False,
        verbose=False,
    )


def _run_pt2(path: Path, x: Tensor) -> dict[str, Tensor]:
    return torch.export.load(path).module()(x)


def _run_onnx(path: Path, x: Tensor) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    names = [each.name for each in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that nobody needs."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
