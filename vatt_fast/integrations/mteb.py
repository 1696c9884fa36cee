"""A model behind MTEB's encoder interface: tasks of video, of audio and of text.

    import mteb
    from vatt_fast.integrations.mteb import VATTEncoder

    mteb.evaluate(VATTEncoder("runs/demo"), mteb.get_tasks(tasks=["..."]))

The model has two spaces: S_vt of video and text, and S_va of video and audio. The task's modalities
choose one; a task across audio and text has none and is refused, and so are clips of both video and
audio. Shapes: T frames, S samples.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from scipy.signal import resample_poly
from torch import Tensor

from ..data.clips import ClipSpec, spread
from ..model import VATT, create_model

_MODALITIES = ("video", "audio", "text")


class VATTEncoder(AbsEncoder):
    """MTEB's encoder.

    Args:
        model_name: a model, or what ``create_model`` takes: a run's folder, for instance.
        revision: written into the results.
        device: of torch.

    Raises:
        ValueError: a model that cannot be read.
    """

    def __init__(
        self,
        model_name: str | Path | VATT,
        revision: str | None = None,
        *,
        device: str | None = None,
        **_: Any,
    ) -> None:
        given = isinstance(model_name, VATT)
        net = model_name if isinstance(model_name, VATT) else create_model(model_name)
        self.vatt = net.to(device or "cpu") if not given or device else net
        self.spec = ClipSpec.from_config(net.config)
        folder = "model" if given else Path(str(model_name)).name
        self.mteb_model_meta = ModelMeta.create_empty(
            dict(
                name=f"vatt_fast/{folder}",
                revision=revision or "no_revision_available",
                modalities=list(_MODALITIES),
                framework=["PyTorch"],
                n_parameters=sum(p.numel() for p in net.parameters()),
                embed_dim=net.config.d_vt,
                similarity_fn_name=ScoringFunction.COSINE,
            )
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """(n, d) unit vectors in the space of the task's modalities.

        Args:
            inputs: batches with a list under "video", "audio" or "text". A video is what
                ``VATT.encode`` takes, a torchcodec decoder, or frames (T, H, W, 3) or (T, 3, H, W)
                uint8 of any size, of which as many as the model's are taken, evenly; audio is
                {"array", "sampling_rate"}, or what ``VATT.encode`` takes. Of anything longer than
                the model's window it is the middle.

        Raises:
            ValueError: modalities that share no space, or several in one clip.
        """
        space = self._space(set(task_metadata.modalities))
        found = []
        for batch in inputs:
            there = [name for name in _MODALITIES if name in batch]
            if len(there) != 1:
                raise ValueError(
                    f"a clip of this task is {' and '.join(there) or 'none of our modalities'}; "
                    "the model embeds one of video, audio and text at a time"
                )
            (modality,) = there
            name = f"z_{modality}_{space}"
            if modality == "text":
                found.append(self.vatt.encode(text=list(batch["text"]))[name])
                continue
            convert = self._frames if modality == "video" else self._waveform
            for clip in batch[modality]:  # of many sizes and kinds
                found.append(self.vatt.encode(**{modality: convert(clip)})[name])
        return torch.cat(found).numpy()

    @staticmethod
    def _space(modalities: set[str]) -> str:
        if others := modalities - set(_MODALITIES):
            raise ValueError(f"the model has no {', '.join(sorted(others))}")
        if {"audio", "text"} <= modalities:
            raise ValueError("audio and text share no space of this model; it was not trained to")
        return "va" if "audio" in modalities else "vt"

    def _frames(self, clip: Any) -> Any:
        """A file as it is; a decoder or frames as (frames, height, width, 3) uint8."""
        if isinstance(clip, str | Path):
            return clip
        if hasattr(clip, "get_frames_played_at"):
            spec, length = self.spec, float(clip.metadata.duration_seconds)
            start = spread(spec.places(length), 1)[0] / spec.frames_per_second
            times = start + np.arange(spec.frames) / spec.frames_per_second
            clip = clip.get_frames_played_at(times.clip(0, max(0.0, length - 1e-3)).tolist()).data
        frames = clip if isinstance(clip, Tensor) else torch.from_numpy(np.asarray(clip, np.uint8))
        if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[-1]):
            raise ValueError(
                f"a video is {tuple(frames.shape)}; it takes (T, H, W, 3) or (T, 3, H, W)"
            )
        if frames.shape[-1] == 3:
            frames = frames.permute(0, 3, 1, 2)
        index = np.linspace(0, len(frames) - 1, self.spec.frames).round().astype(int)
        return self._cropped(frames[torch.from_numpy(index)]).permute(0, 2, 3, 1)

    def _cropped(self, frames: Tensor) -> Tensor:
        """(T, 3, H, W) uint8 -> (T, 3, height, width): the middle, after the shorter side fits."""
        size = self.spec.height, self.spec.width
        if frames.shape[2:] == size:
            return frames
        factor = max(target / now for target, now in zip(size, frames.shape[2:], strict=True))
        wide = [max(t, round(n * factor)) for t, n in zip(size, frames.shape[2:], strict=True)]
        frames = F.interpolate(frames.float(), wide, mode="bilinear", antialias=True)
        top, left = ((n - t) // 2 for n, t in zip(wide, size, strict=True))
        frames = frames[:, :, top : top + size[0], left : left + size[1]]
        return frames.round().clamp(0, 255).to(torch.uint8)

    def _waveform(self, clip: Any) -> Any:
        if not isinstance(clip, dict):
            return clip
        wave = np.asarray(clip["array"], np.float32)
        wave = wave.mean(0) if wave.ndim == 2 else wave
        rate = Fraction(self.spec.sample_rate_hz, int(clip["sampling_rate"]))
        if rate != 1:
            wave = resample_poly(wave, rate.numerator, rate.denominator).astype(np.float32)
        first = max(0, len(wave) - self.spec.samples) // 2
        wave = wave[first : first + self.spec.samples].clip(-1, 1)
        return np.pad(wave, (0, self.spec.samples - len(wave)))
