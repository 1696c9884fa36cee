"""Sizes and choices of a VATT model: one frozen record, and the paper's presets as one table."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Recipe = Literal["paper", "released"]
Kind = Literal["modality_specific", "modality_agnostic"]
NCEForm = Literal["paper", "released", "symmetric"]
AudioInput = Literal["waveform", "spectrogram"]

MODALITIES = ("video", "audio", "text")
NORM_EPS = 1e-6  # of every LayerNorm and RMS norm
MEL_RANGE_HZ = (80.0, 7600.0)  # of a spectrogram
MAX_SCALE = 100.0  # 1 / temperature never exceeds it


def video_grid(
    frames: int, height: int, width: int, patch: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Patches along time, height and width, the last ones padded."""
    return -(-frames // patch[0]), -(-height // patch[1]), -(-width // patch[2])


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be positive")


def _refuse_unknown_keys(cls: type, values: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(
            f"unknown {cls.__name__} keys: {', '.join(unknown)}; it has {', '.join(known)}"
        )


@dataclass(frozen=True)
class TowerConfig:
    """One transformer encoder. ``num_heads * head_dim`` may differ from ``dim``."""

    depth: int
    dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int = 64

    def __post_init__(self) -> None:
        _require_positive(self, "depth", "dim", "mlp_dim", "num_heads", "head_dim")


SMALL = TowerConfig(depth=6, dim=512, mlp_dim=2048, num_heads=8)
BASE = TowerConfig(depth=12, dim=768, mlp_dim=3072, num_heads=12)
MEDIUM = TowerConfig(depth=12, dim=1024, mlp_dim=4096, num_heads=16)
LARGE = TowerConfig(depth=24, dim=1024, mlp_dim=4096, num_heads=16)


_POSITIVE = (
    "frames",
    "height",
    "width",
    "samples",
    "audio_patch",
    "mel_bins",
    "words",
    "texts_per_clip",
    "vocab_size",
    "d_va",
    "d_vt",
    "relative_buckets",
    "relative_max_distance",
    "frames_per_second",
    "sample_rate_hz",
)


@dataclass(frozen=True)
class VATTConfig:
    """Everything that shapes a model and its loss (paper sections 3.1-3.4; sizes from its Table 7).

    A ``modality_agnostic`` model has one trunk: ``video``, ``audio`` and ``text`` are then the same
    tower. ``with_recipe`` switches between the two published sets of choices.
    """

    kind: Kind = "modality_specific"
    video: TowerConfig = BASE
    audio: TowerConfig = BASE
    text: TowerConfig = SMALL

    frames: int = 32
    height: int = 224
    width: int = 224
    frames_per_second: float = 10.0
    video_patch: tuple[int, int, int] = (4, 16, 16)  # frames, rows, columns

    samples: int = 153600
    sample_rate_hz: int = 48000
    audio_input: AudioInput = "waveform"
    audio_patch: int = 128  # samples, of a waveform
    mel_bins: int = 80  # of a spectrogram, and the next
    spectrogram_patch: tuple[int, int] = (16, 5)  # frames, mel bins

    words: int = 16
    texts_per_clip: int = 5
    vocab_size: int = 65536
    # None: a learned table straight to dim (paper); 300: word2vec and a projection (release)
    word_dim: int | None = None
    train_words: bool = True
    relative_buckets: int = 32
    relative_max_distance: int = 64

    post_proj_dim: int | None = None  # modality_agnostic only; None: dim
    d_va: int = 512
    d_vt: int = 256
    heads: Recipe = "paper"
    batch_norm_momentum: float = 0.1
    batch_norm_eps: float = 1e-5
    dropout: float = 0.0

    nce_form: NCEForm = "paper"
    temperature: float = 0.07
    learn_temperature: bool = False
    va_weight: float = 1.0  # loss = va_weight * L_va + vt_weight * L_vt
    vt_weight: float = 1.0  # the paper's lambda

    def __post_init__(self) -> None:
        words = dict(kind=Kind, heads=Recipe, nce_form=NCEForm, audio_input=AudioInput)
        for name, kind in words.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is one of {', '.join(get_args(kind))}"
                )
        _require_positive(self, *_POSITIVE)
        if len(self.video_patch) != 3 or min(self.video_patch) < 1:
            raise ValueError(
                f"video_patch is {self.video_patch}; "
                "it takes three positive sizes (frames, rows, columns)"
            )
        if self.audio_input == "spectrogram":
            self._check_spectrogram()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it lies in [0, 1)")
        if not self.temperature >= 0.01:
            raise ValueError(
                f"temperature is {self.temperature}; "
                "it is at least 0.01, where the logits' factor is capped at 100"
            )
        if self.kind == "modality_agnostic" and not self.video == self.audio == self.text:
            raise ValueError(
                "a modality_agnostic model shares one trunk: "
                "video, audio and text must be the same tower"
            )
        if self.kind == "modality_specific" and self.post_proj_dim is not None:
            raise ValueError("post_proj_dim belongs to modality_agnostic models; leave it None")

    def _check_spectrogram(self) -> None:
        patch = self.spectrogram_patch
        if len(patch) != 2 or min(patch) < 1 or self.mel_bins % patch[1]:
            raise ValueError(
                f"spectrogram_patch is {patch}; it takes two positive sizes (frames, mel bins), "
                f"and the second divides mel_bins, {self.mel_bins}"
            )
        if self.sample_rate_hz < 2 * MEL_RANGE_HZ[1]:
            raise ValueError(
                f"sample_rate_hz is {self.sample_rate_hz}; a spectrogram reaches up to "
                f"{MEL_RANGE_HZ[1]:g} Hz and takes at least {2 * MEL_RANGE_HZ[1]:g}"
            )
        if not self.num_audio_patches:
            raise ValueError(
                f"samples is {self.samples}; a spectrogram patch of {patch[0]} frames takes at "
                f"least {(patch[0] - 1) * self.spectrogram_hop + 1}"
            )

    @property
    def agnostic(self) -> bool:
        return self.kind == "modality_agnostic"

    @property
    def video_grid(self) -> tuple[int, int, int]:
        """Patches along time, height and width.

        A clip that is no multiple of the patch is padded at its far end.
        """
        return video_grid(self.frames, self.height, self.width, self.video_patch)

    @property
    def num_video_patches(self) -> int:
        return math.prod(self.video_grid)

    @property
    def audio_grid(self) -> tuple[int, ...]:
        """Patches of a waveform; of a spectrogram those along time and along mel bins."""
        return self.audio_grid_of(self.samples)

    def audio_grid_of(self, samples: int) -> tuple[int, ...]:
        """``audio_grid`` of another length. A spectrogram's last frames that fill no patch go."""
        if self.audio_input == "waveform":
            return (-(-samples // self.audio_patch),)
        frames = -(-samples // self.spectrogram_hop)
        return frames // self.spectrogram_patch[0], self.mel_bins // self.spectrogram_patch[1]

    @property
    def num_audio_patches(self) -> int:
        return math.prod(self.audio_grid)

    @property
    def audio_patch_values(self) -> int:
        waveform = self.audio_input == "waveform"
        return self.audio_patch if waveform else math.prod(self.spectrogram_patch)

    def loaded_audio(self, kept: int) -> tuple[int, ...]:
        """Shape of a training clip's audio: ``kept`` patch rows, or for a spectrogram all of it."""
        return (kept, self.audio_patch) if self.audio_input == "waveform" else (self.samples,)

    @property
    def spectrogram_hop(self) -> int:
        """Samples from one frame of a spectrogram to the next; a frame is twice as long."""
        return round(self.sample_rate_hz * 1024 / 48000)

    @property
    def video_patch_values(self) -> int:
        return 3 * math.prod(self.video_patch)

    @property
    def clip_seconds(self) -> float:
        return self.frames / self.frames_per_second

    def pooled_dim(self, modality: str) -> int:
        """Width of a tower's pooled output, which the common space reads."""
        tower: TowerConfig = getattr(self, modality)
        return (self.post_proj_dim or tower.dim) if self.agnostic else tower.dim

    def with_recipe(self, recipe: Recipe) -> "VATTConfig":
        """The same sizes with the choices of the paper's text, or those of the released code."""
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}; it is one of {', '.join(RECIPES)}")
        return dataclasses.replace(self, **RECIPES[recipe])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "VATTConfig":
        """Inverse of ``to_json``. Raises ValueError for no JSON and for unknown keys."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the config is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"the config is a JSON {type(values).__name__}; "
                "it must be an object of VATTConfig's fields"
            )
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VATTConfig":
        values = dict(values)
        _refuse_unknown_keys(cls, values)
        for modality in ("video", "audio", "text"):
            if isinstance(values.get(modality), dict):
                _refuse_unknown_keys(TowerConfig, values[modality])
                values[modality] = TowerConfig(**values[modality])
        for name in ("video_patch", "spectrogram_patch"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


RECIPES: dict[str, dict[str, Any]] = {
    "paper": dict(
        word_dim=None,
        train_words=True,
        heads="paper",
        nce_form="paper",
        dropout=0.0,
        va_weight=1.0,
        vt_weight=1.0,
    ),
    "released": dict(
        word_dim=300,
        train_words=False,
        heads="released",
        nce_form="released",
        dropout=0.1,
        va_weight=0.5,
        vt_weight=0.5,
    ),
}

_TINY = TowerConfig(depth=3, dim=128, mlp_dim=512, num_heads=4, head_dim=32)

# The first four are the paper's (Table 7 and section 4). tiny is ours, for the demo and for tests:
# seconds on a laptop.
PRESETS: dict[str, VATTConfig] = {
    "base_base_small": VATTConfig(video=BASE, audio=BASE, text=SMALL),
    "medium_base_small": VATTConfig(video=MEDIUM, audio=BASE, text=SMALL),
    "large_base_small": VATTConfig(video=LARGE, audio=BASE, text=SMALL),
    "agnostic_medium": VATTConfig(
        kind="modality_agnostic", video=MEDIUM, audio=MEDIUM, text=MEDIUM
    ),
    "tiny": VATTConfig(
        video=_TINY,
        audio=_TINY,
        text=dataclasses.replace(_TINY, depth=2),
        frames=16,
        height=64,
        width=64,
        video_patch=(4, 8, 8),
        samples=25600,
        sample_rate_hz=16000,
        vocab_size=512,
        d_va=64,
        d_vt=64,
    ),
}
SHORT_NAMES = {
    "bbs": "base_base_small",
    "mbs": "medium_base_small",
    "lbs": "large_base_small",
    "ma": "agnostic_medium",
}


# Clips of which the paper prints GFLOPs (frames, rows, columns), and patches to set beside its own.
CLIP_SIZES = ((32, 224, 224), (64, 224, 224), (32, 320, 320))
VIDEO_PATCHES = ((4, 16, 16), (2, 16, 16), (8, 16, 16), (4, 32, 32))
# Of the audio tower: samples of a patch of the waveform; None for a spectrogram.
AUDIO_PATCHES = (128, 256, 512, 1024, None)


def with_input(
    config: VATTConfig,
    *,
    clip: tuple[int, int, int] | None = None,
    video_patch: tuple[int, int, int] | None = None,
    audio_patch: int | None = None,
    audio_input: AudioInput | None = None,
) -> VATTConfig:
    """The same towers for clips (frames, rows, columns), patches or audio of another kind.

    What is None stays. Raises ValueError for sizes that do not fit.
    """
    changes: dict[str, Any] = {}
    if clip is not None:
        changes |= dict(zip(("frames", "height", "width"), clip, strict=True))
    given = dict(video_patch=video_patch, audio_patch=audio_patch, audio_input=audio_input)
    changes |= {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **changes)


def preset(name: str, recipe: Recipe = "paper") -> VATTConfig:
    """The preset of that name; short names are bbs, mbs, lbs, ma.

    Raises ValueError for an unknown one.
    """
    full = SHORT_NAMES.get(name.lower(), name)
    if full not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}; "
            f"there are {', '.join(PRESETS)} (short: {', '.join(SHORT_NAMES)})"
        )
    return PRESETS[full].with_recipe(recipe)
