"""VATT as a model of transformers 5: AutoModel, AutoConfig, AutoProcessor, Trainer, the hub.

    from vatt_fast.integrations.transformers_model import VATTModel, VATTProcessor, register

    register()                                              # for the Auto classes
    model = VATTModel.from_pretrained("runs/demo")          # a run's folder, or one of these
    processor = VATTProcessor.from_pretrained("runs/demo")
    model.save_pretrained("hub"); processor.save_pretrained("hub")    # or push_to_hub(name)
    model = AutoModel.from_pretrained("hub")                # vf.create_model("hub") as well

Names and values of the weights are those of ``vatt_fast.VATT``. Shapes: B clips, P texts a clip,
W words.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import PROCESSOR_NAME, ModelOutput, PushToHubMixin, cached_file

from ..arrays import as_frames, as_waveforms
from ..config import VATTConfig
from ..data.clips import ClipSpec, spread
from ..data.media import MediaReader
from ..data.text import Vocabulary
from ..files import write_text
from ..losses import vatt_loss
from ..model import VATT, Block, Encoder
from ..weights import CONFIG, VOCABULARY

_CONVERT = {"video": as_frames, "audio": as_waveforms}
# what of from_pretrained's options finds a file
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def register() -> None:
    """Make the Auto classes of transformers know these."""
    AutoConfig.register("vatt", VATTPretrainedConfig, exist_ok=True)
    AutoModel.register(VATTPretrainedConfig, VATTModel, exist_ok=True)
    AutoProcessor.register(VATTPretrainedConfig, VATTProcessor, exist_ok=True)


class VATTPretrainedConfig(PreTrainedConfig):
    """transformers' configuration around ours, which ``sizes`` gives.

    Args:
        vatt: the fields of ``VATTConfig``; ``VATTPretrainedConfig.of(config)`` fills them in. The
            fields themselves, as in the config.json of a run's folder, are taken as well.

    Raises:
        ValueError: fields that ``VATTConfig`` does not have, or refuses.
    """

    model_type = "vatt"
    vatt: dict[str, Any] | None = None

    def __post_init__(self, **others: Any) -> None:
        names = {field.name for field in dataclasses.fields(VATTConfig)}
        own = {name: others.pop(name) for name in names & others.keys()}
        sizes = VATTConfig.from_dict(own if self.vatt is None else self.vatt)
        self.vatt = json.loads(sizes.to_json())  # lists in place of tuples, as after loading
        super().__post_init__(**others)

    @classmethod
    def of(cls, sizes: VATTConfig, **options: Any) -> "VATTPretrainedConfig":
        return cls(vatt=json.loads(sizes.to_json()), **options)

    @property
    def sizes(self) -> VATTConfig:
        return VATTConfig.from_dict(self.vatt or {})


@dataclasses.dataclass
class VATTModelOutput(ModelOutput):
    """``vatt_fast.VATTOutput`` with the loss, where it was asked for, and its two parts."""

    loss: Tensor | None = None
    loss_va: Tensor | None = None
    loss_vt: Tensor | None = None
    z_video_va: Tensor | None = None
    z_audio_va: Tensor | None = None
    z_video_vt: Tensor | None = None
    z_text_vt: Tensor | None = None
    video_pooled: Tensor | None = None
    audio_pooled: Tensor | None = None
    text_pooled: Tensor | None = None
    video_features: Tensor | None = None
    audio_features: Tensor | None = None
    text_features: Tensor | None = None


class VATTModel(PreTrainedModel):
    """The three towers and the common space. ``vatt`` is the same model as a ``vatt_fast.VATT``:
    for ``encode``, ``sample_keep`` and whatever else takes one."""

    config_class = VATTPretrainedConfig
    main_input_name = "video"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_scale"]

    def __init__(self, config: VATTPretrainedConfig):
        super().__init__(config)
        vatt = VATT(config.sizes)
        # one set of modules and weights under two roofs, whatever replaces a weight
        self._modules, self._parameters, self._buffers = (
            vatt._modules,
            vatt._parameters,
            vatt._buffers,
        )
        object.__setattr__(self, "vatt", vatt)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        video_keep: Tensor | None = None,
        audio_keep: Tensor | None = None,
        video_valid: Tensor | None = None,
        audio_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
        features: bool = False,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> VATTModelOutput | tuple[Tensor, ...]:
        """As ``VATT.forward`` takes them; any subset of modalities.

        Args:
            return_loss: also the pre-training loss of the batch (``vatt_loss``) over all processes,
                as trainers that average gradients need it. It takes video with audio or text.

        Raises:
            ValueError: as ``VATT.forward``; with ``return_loss`` no pair of modalities.
        """
        valid: dict[str, Any] = dict(
            video_valid=video_valid, audio_valid=audio_valid, text_valid=text_valid
        )
        keeps = dict(video_keep=video_keep, audio_keep=audio_keep)
        found = self.vatt(video, audio, text, features=features, **keeps, **valid)
        out = VATTModelOutput(**{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
        if return_loss:
            loss = vatt_loss(found, self.vatt.config, scale=self.vatt.scale(), **valid)
            out = VATTModelOutput(**out, loss=loss.total, loss_va=loss.va, loss_vt=loss.vt)
        return out if return_dict or return_dict is None else out.to_tuple()

    def train(self, mode: bool = True) -> "VATTModel":
        self.vatt.training = mode
        return super().train(mode)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any):
        """As transformers', for its own folders, the hub's, and those of ``vatt_fast``.

        Raises:
            ValueError: weights are missing, or are of another config.
        """
        tell = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *arguments, output_loading_info=True, **options
        )
        wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        if wrong:
            told = "; ".join(f"{name} {', '.join(keys[:3])}" for name, keys in wrong.items())
            raise ValueError(f"{pretrained_model_name_or_path} does not fit its config: {told}")
        model._after_loading()
        model.vatt.vocabulary = _vocabulary(pretrained_model_name_or_path, options)
        return (model, info) if tell else model

    def save_pretrained(
        self, save_directory: Any, *arguments: Any, push_to_hub: bool = False, **options: Any
    ) -> None:
        """transformers' files, and vocabulary.txt where the model has one."""
        names = {name: options.pop(name) for name in ("repo_id", "token") if name in options}
        super().save_pretrained(save_directory, *arguments, **options)
        if self.vatt.vocabulary is not None:
            self.vatt.vocabulary.save(Path(save_directory) / VOCABULARY)
        if push_to_hub:
            self.push_to_hub(names.pop("repo_id", Path(save_directory).name), **names)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules come with their weights, and a folder without one is refused."""

    def _after_loading(self) -> None:
        """What transformers' loading does not keep: frozen weights and tables of constants."""
        sizes = self.vatt.config
        self.log_scale.requires_grad_(sizes.learn_temperature)
        self.text_tokens.table.weight.requires_grad_(sizes.train_words)
        for module in self.modules():
            if isinstance(module, Encoder):
                module._place_buckets()

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        if options.get("every_n_layers", 1) != 1:
            raise ValueError("every block is checkpointed, or none: leave every_n_layers at 1")
        self.gradient_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = "blocks" if enable else "none"


class VATTProcessor(PushToHubMixin):
    """Files and arrays to what the model takes.

    Args:
        sizes: of the model's clips.
        vocabulary: of its text tower; None where there is none.
    """

    def __init__(self, sizes: VATTConfig | None = None, vocabulary: Vocabulary | None = None):
        self.sizes, self.vocabulary = sizes or VATTConfig(), vocabulary

    def __call__(
        self,
        video: Any = None,
        audio: Any = None,
        text: Any = None,
        *,
        return_loss: bool | None = None,
    ) -> BatchFeature:
        """Any subset of modalities; what is missing in a clip is zeros with its ``valid`` False.

        Args:
            video: one or a list of media files, frames (T, H, W, 3) as ``VATT.encode`` takes them,
                or None. Of a file it is the window in its middle.
            audio: one or a list of media files, waveforms (S,), or None.
            text: a sentence, a list of one a clip, or a list of lists of sentences; None or an
                empty list is a clip without any.
            return_loss: goes to the model with the rest.

        Returns:
            video (B, T, H, W, 3), audio (B, S), text (B, P, W) int32, and video_valid (B,),
            audio_valid (B,), text_valid (B, P) bool.

        Raises:
            ValueError: nothing given, clips of several sizes, or text without a vocabulary.
        """
        if video is None and audio is None and text is None:
            raise ValueError("nothing to process; give at least one of video, audio, text")
        data: dict[str, Any] = {}
        for name, given in (("video", video), ("audio", audio)):
            if given is not None:
                data[name], data[f"{name}_valid"] = self._clips(name, given)
        if text is not None:
            data["text"], data["text_valid"] = self._texts(text)
        counts = {name: len(value) for name, value in data.items() if not name.endswith("_valid")}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"clips are {told}; give equally many, None where one is missing")
        if return_loss is not None:
            data["return_loss"] = return_loss
        return BatchFeature(data)

    def _clips(self, name: str, given: Any) -> tuple[Tensor, Tensor]:
        if isinstance(given, list | tuple):
            values = list(given)
        else:
            values = [given] if isinstance(given, str | Path) else list(_CONVERT[name](given))
        read = [None if each is None else self._clip(name, each) for each in values]
        there = [each for each in read if each is not None]
        spec = ClipSpec.from_config(self.sizes)
        size = (spec.frames, spec.height, spec.width, 3) if name == "video" else (spec.samples,)
        zeros = torch.zeros_like(there[0]) if there else torch.zeros(size)
        shapes = {tuple(each.shape) for each in there}
        if len(shapes) > 1 or len({each.dtype for each in there}) > 1:
            raise ValueError(f"{name} of one call has one size and dtype, got {sorted(shapes)}")
        valid = torch.tensor([each is not None for each in read])
        return torch.stack([zeros if each is None else each for each in read]), valid

    def _clip(self, name: str, given: Any) -> Tensor | None:
        """One clip of an array, or of a file; None where the file has nothing in its middle."""
        if not isinstance(given, str | Path):
            return _CONVERT[name](given)[0]
        spec = ClipSpec.from_config(self.sizes)
        with MediaReader(given) as reader:
            (place,) = spread(spec.places(reader.info.duration_seconds), 1)
            start = place / spec.frames_per_second
            clip = reader.clip(start=start, **spec.reader_arguments(), only=name)
        value = getattr(clip, name) if getattr(clip, f"{name}_valid") else None
        return None if value is None else torch.from_numpy(np.ascontiguousarray(value))

    def _texts(self, given: Any) -> tuple[Tensor, Tensor]:
        if self.vocabulary is None:
            raise ValueError("this processor has no vocabulary, so it cannot read sentences")
        rows: list[Sequence[str]] = [
            [each] if isinstance(each, str) else list(each or ())
            for each in ([given] if isinstance(given, str) else given)
        ]
        most = max(1, *(len(row) for row in rows))
        padded = [sentence for row in rows for sentence in (*row, *[""] * (most - len(row)))]
        numbers = torch.from_numpy(self.vocabulary.encode(padded, self.sizes.words))
        numbers = numbers.unflatten(0, (len(rows), most))
        return numbers, numbers.any(-1)  # a sentence without words is no text

    @property
    def model_input_names(self) -> list[str]:
        names = ("video", "audio", "text")
        return [*names, *(f"{name}_valid" for name in names)]

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **options: Any
    ) -> None:
        """processor_config.json, vocabulary.txt, and config.json where there is none yet."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PROCESSOR_NAME, json.dumps({"processor_class": type(self).__name__}))
        if self.vocabulary is not None:
            self.vocabulary.save(folder / VOCABULARY)
        if not (folder / CONFIG).exists():
            VATTPretrainedConfig.of(self.sizes).save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", folder.name), **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any):
        """Of a folder or a name of the hub that has the model's config.json."""
        of_the_hub = {name: options[name] for name in _OF_THE_HUB if name in options}
        config = VATTPretrainedConfig.from_pretrained(pretrained_model_name_or_path, **of_the_hub)
        return cls(config.sizes, _vocabulary(pretrained_model_name_or_path, options))


def _vocabulary(name: Any, options: dict[str, Any]) -> Vocabulary | None:
    given = {key: options[key] for key in _OF_THE_HUB if key in options}
    path = cached_file(name, VOCABULARY, **given, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Vocabulary.load(path)
