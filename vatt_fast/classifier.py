"""One fine-tuned tower and its classifier, as in the released fine-tuned checkpoints.

    model = Classifier.from_pretrained("runs/vit_base_k400")
    logits = model(clips)  # (B, 32, 320, 320, 3) uint8 -> (B, 400)

Its weights have the names of VATT's, ``video_tokens`` and ``video_encoder`` or ``trunk``, and
``classifier``.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints.released import Released
from .config import VATTConfig
from .files import write_text
from .inputs import audio_input, require_input, video_input
from .model import Encoder, PatchTokens, audio_rows, run_encoder, with_weights
from .weights import CONFIG, WEIGHTS, is_classifier, load_weights, read_saved, save_tensors

LABELS = "labels.txt"


@dataclass(frozen=True)
class ClassifierConfig:
    """Which tower of ``model``, "video" or "audio", and the number of classes."""

    model: VATTConfig
    modality: str
    num_classes: int

    def __post_init__(self) -> None:
        if self.modality not in ("video", "audio"):
            raise ValueError(f"modality is {self.modality!r}; it is video or audio")
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be positive")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ClassifierConfig":
        """Inverse of ``to_json``. Raises ValueError for anything else."""
        if not is_classifier(text):
            raise ValueError("it is no classifier's config, which has num_classes")
        values = json.loads(text)
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(names):
            raise ValueError(f"its keys are {sorted(values)}; they must be {sorted(names)}")
        return cls(**values | {"model": VATTConfig.from_dict(values["model"])})


class Classifier(nn.Module):
    """Pooled output of a tower -> logits.

    ``labels`` are the classes' names, where somebody gave them: the released checkpoints have none.
    """

    classifier_dropout = 0.0  # of the pooled output, in training

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.settings, self.config = config, config.model
        self.labels: list[str] | None = None
        c, modality = config.model, config.modality
        tower = getattr(c, modality)
        values, grid = c.audio_patch_values, c.audio_grid
        if modality == "video":
            values, grid = c.video_patch_values, c.video_grid
        tokens = PatchTokens(values, grid, tower.dim, pre_proj=c.agnostic, dropout=c.dropout)
        self.add_module(f"{modality}_tokens", tokens)
        encoder = Encoder(tower, dropout=c.dropout)
        self.add_module("trunk" if c.agnostic else f"{modality}_encoder", encoder)
        width = c.pooled_dim(modality)
        if c.agnostic:
            self.post_proj = nn.ModuleDict({modality: nn.Linear(tower.dim, width)})
        self.classifier = nn.Linear(width, config.num_classes)

    def forward(
        self, clips: Tensor, *, keep: Any = None, grid: tuple[int, int, int] | None = None
    ) -> Tensor:
        """Logits (B, classes) of clips or waveforms, in any form that ``VATT.forward`` takes."""
        require_input(clips, None, None)
        modality = self.settings.modality
        if modality == "video":
            how = video_input(self.config, clips, keep, grid)
        else:
            how = audio_input(self.config, clips, keep)
            clips = audio_rows(self.config, clips)
        tokens = getattr(self, f"{modality}_tokens")(clips, how, keep)
        _, pooled = run_encoder(self, modality, tokens, features=False)
        return self.classifier(F.dropout(pooled, self.classifier_dropout, self.training))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if there are any, labels.txt."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.state_dict(), folder / WEIGHTS)
        write_text(folder / CONFIG, self.settings.to_json() + "\n")
        if self.labels is not None:
            write_text(folder / LABELS, "\n".join(self.labels) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Classifier":
        """Read what ``save_pretrained`` wrote; the model is in evaluation mode.

        Raises:
            ValueError: files are missing, cut short or of another config.
        """
        config, tensors, labels = read_classifier(folder)
        model = cls(config)
        load_weights(model, tensors, source=str(Path(folder) / WEIGHTS))
        model.labels = labels
        return model.eval()

    @classmethod
    def from_released(cls, released: Released) -> "Classifier":
        """The model of what ``checkpoints.released.read_released`` read, in evaluation mode.

        Raises:
            ValueError: it is a pre-trained model, without a classifier.
        """
        if released.modality is None or released.num_classes is None:
            raise ValueError(
                "this checkpoint is pre-trained and has no classifier; load it with create_model"
            )
        config = ClassifierConfig(released.config, released.modality, released.num_classes)
        return with_weights(lambda: cls(config), released.tensors).eval()


def read_classifier(
    folder: str | Path,
) -> tuple[ClassifierConfig, dict[str, Tensor], list[str] | None]:
    """Config, tensors and labels of a folder that ``Classifier.save_pretrained`` wrote.

    Raises:
        ValueError: a file is missing or damaged.
    """
    from_json, folder = ClassifierConfig.from_json, Path(folder)
    config, tensors = read_saved(folder, from_json, written_by="convert or finetune")
    labels = None
    if (folder / LABELS).is_file():
        labels = read_labels(folder / LABELS, config.num_classes)
    return config, tensors, labels


def read_labels(path: str | os.PathLike, num_classes: int) -> list[str]:
    """Classes' names in the order of the classifier's outputs: one a line, or a JSON list.

    Raises:
        ValueError: no such file, another number of names, or a name twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        labels = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as labels: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
        raise ValueError(f"{path} is no list of names; write one name a line")
    labels = [label.strip() for label in labels]
    if len(labels) != num_classes:
        raise ValueError(
            f"{path} has {len(labels)} names, the classifier {num_classes} outputs; give one name "
            "an output, in their order"
        )
    if len(set(labels)) < num_classes or "" in labels:
        twice = next(label for label in labels if labels.count(label) > 1 or not label)
        raise ValueError(f"{path}: {twice!r} is empty or there twice; each class has its own name")
    return labels
