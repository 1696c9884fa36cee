"""Whole steps: the configurations, their batches, and one model that every formulation runs.

A training step is forward, losses, backward and fused Adam, on kept rows as a loader writes them.
An inference takes frames and waveforms, and reads the clip in place. The contenders run one and the
same model on the same batches, in turn. Plain is the model on the backend "plain": what a user
writes today. FLOPs are the model's, for training three times the forward pass.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt_fast.config import MEDIUM, PRESETS, SHORT_NAMES, TowerConfig, VATTConfig, preset
from vatt_fast.flops import true_flops
from vatt_fast.inputs import sample_keeps
from vatt_fast.kernels import use_backend
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT, VATTOutput
from vatt_fast.paper_tables import flops_table

from .floors import Mode
from .timer import Call

_BATCHES = 2  # rotated through
CLASSES = 600  # of a classifier: Kinetics-600's, the tower that Table 7 counts
MODALITIES = ("video", "audio", "text")
_UNUSED = TowerConfig(depth=1, dim=16, mlp_dim=16, num_heads=1, head_dim=16)

# -- configurations ---------------------------------------------------------------------------


class Configuration(NamedTuple):
    config: VATTConfig
    modalities: tuple[str, ...] = MODALITIES
    published_as: tuple[int, str] | None = None  # the paper's table and row


def _video(frames: int, side: int) -> Configuration:
    config = VATTConfig(
        video=MEDIUM,
        audio=_UNUSED,
        text=_UNUSED,
        vocab_size=2,
        frames=frames,
        height=side,
        width=side,
    )
    return Configuration(config, ("video",), (6, f"medium {frames}x{side}x{side}"))


# Table 5's multimodal model, which counts two texts, and Table 6's video model at its input sizes
OF_THE_PAPER: dict[str, Configuration] = {
    "mbs_32x224x224": Configuration(
        dataclasses.replace(preset("medium_base_small"), texts_per_clip=2),
        published_as=(5, "medium_base_small 32x224x224"),
    ),
    "medium_video_32x224x224": _video(32, 224),
    "medium_video_64x224x224": _video(64, 224),
    "medium_video_32x320x320": _video(32, 320),
    "tiny": Configuration(PRESETS["tiny"]),  # whose accuracy is measured too
}
CONFIGURATIONS: dict[str, Configuration] = {
    **{name: Configuration(preset(name)) for name in (*PRESETS, *SHORT_NAMES)},
    **OF_THE_PAPER,
}


def gflops(name: str, drop_rate: float) -> tuple[float, float | None]:
    """Of a clip forward, of a name in ``OF_THE_PAPER``: as timed, and as published if it was.

    As timed: kept patches projected, the configuration's own texts, the last blocks for AGG alone.
    """
    config, modalities, published_as = OF_THE_PAPER[name]
    counted = true_flops(config, drop_rate, features=False, modalities=modalities)
    published = {
        (row["table"], row["configuration"], row["drop_rate"]): row["published_gflops"]
        for row in flops_table()
    }
    found = published.get((*published_as, drop_rate)) if published_as else None
    return sum(counted.values()) / 1e9, found


# -- formulations -----------------------------------------------------------------------------


class Formulation(NamedTuple):
    """How one contender runs the model."""

    name: str  # auto: ours, or plain
    compile: str | None = None  # a mode of torch.compile

    @property
    def ours(self) -> bool:
        return self.name == "auto"

    @property
    def backend(self) -> str:
        return "" if self.ours else self.name

    @property
    def title(self) -> str:
        if self.compile is None:
            return self.name
        return f"{self.name}_{'compiled' if self.compile == 'default' else self.compile}"

    def compiled(self, function: Callable) -> Callable:
        if self.compile is None:
            return function
        return torch.compile(function, dynamic=False, mode=self.compile)


def formulations(names: Sequence[str], compile_modes: Sequence[str]) -> list[Formulation]:
    """Each of ``names`` eager and under each mode of torch.compile."""
    return [Formulation(name, mode) for name in names for mode in (None, *compile_modes)]


# -- batches ----------------------------------------------------------------------------------


def make_batch(
    config: VATTConfig,
    batch: int,
    drop_rate: float,
    mode: Mode,
    device: torch.device,
    seed: int,
    modalities: tuple[str, ...] = MODALITIES,
) -> dict[str, Tensor]:
    """What the model takes, by the road of training or of inference.

    Training: the kept rows of video (B, K, k) uint8 and audio (B, K, k) as the loader writes them.
    Inference: frames (B, T, H, W, 3) uint8 and waveforms (B, S). Both: word ids (B, P, W), and the
    kept indices of the step where patches are dropped.
    """
    c, generator = config, torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    if drop_rate:
        keeps = sample_keeps(c, drop_rate, seed=0, step=seed)
        made |= {name: torch.as_tensor(keep) for name, keep in keeps.items()}
    if mode == "fwd":
        video: tuple[int, ...] = (batch, c.frames, c.height, c.width, 3)
        audio: tuple[int, ...] = (batch, c.num_audio_patches * c.audio_patch)
    else:
        counts = {"video_keep": c.num_video_patches, "audio_keep": c.num_audio_patches}
        rows = {name: made[name].shape[-1] if drop_rate else n for name, n in counts.items()}
        video = (batch, rows["video_keep"], c.video_patch_values)
        audio = (batch, rows["audio_keep"], c.audio_patch)
    made["video"] = torch.randint(0, 256, video, dtype=torch.uint8, generator=generator)
    made["audio"] = torch.rand(audio, generator=generator) * 2 - 1
    text = torch.randint(1, c.vocab_size, (batch, c.texts_per_clip, c.words), generator=generator)
    lengths = torch.randint(1, c.words + 1, (batch, c.texts_per_clip, 1), generator=generator)
    made["text"] = text * (torch.arange(c.words) < lengths)  # padding behind
    return {
        name: value.to(device)
        for name, value in made.items()
        if name.partition("_")[0] in modalities
    }


# -- the model --------------------------------------------------------------------------------


class Trainer:
    """A model with its optimizer and batches, and the calls that a contender is timed by.

    With all modalities it is pre-trained. With one alone, that tower is a classifier in
    fine-tuning; make the towers that never run small.
    """

    def __init__(
        self,
        config: VATTConfig,
        device: torch.device,
        dtype: torch.dtype,
        modalities: tuple[str, ...] = MODALITIES,
    ):
        self.config, self.device, self.dtype, self.modalities = config, device, dtype, modalities
        torch.manual_seed(0)
        self.model = VATT(config).to(device)
        self.head: nn.Linear | None = None
        if modalities != MODALITIES:
            self.head = nn.Linear(config.pooled_dim(*modalities), CLASSES, device=device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        trainable += [] if self.head is None else self.head.parameters()
        self.optimizer = torch.optim.Adam(trainable, lr=1e-5, fused=True)
        self.batches: list[dict[str, Tensor]] = []

    def set_batch(self, batch: int, drop_rate: float, mode: Mode) -> None:
        self.batches = [
            make_batch(self.config, batch, drop_rate, mode, self.device, seed, self.modalities)
            for seed in range(_BATCHES)
        ]

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def calls(self, formulation: Formulation, mode: Mode) -> list[Call]:
        """Steps of training, or where the mode is fwd of inference, one a batch."""
        return self.inference_of(formulation) if mode == "fwd" else self.step_of(formulation)

    def step_of(self, formulation: Formulation) -> list[Call]:
        """Training steps, each returning its loss; the model is put in training mode."""
        self.model.train()

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            output = self.model(**batch)
            if self.head is not None:  # for some labels
                scores = self._scores(output).float()
                return F.cross_entropy(
                    scores, torch.arange(len(scores), device=self.device) % CLASSES
                )
            return vatt_loss(output, self.config, scale=self.model.scale()).total

        function = formulation.compiled(loss_of)

        def step(batch: dict[str, Tensor]) -> Tensor:
            # first: the last step's gradients would lie beside this one's activations
            self.forget_gradients()
            with use_backend(formulation.backend):
                with self.autocast():
                    loss = function(batch)
                loss.backward()
                self.optimizer.step()
            return loss.detach()

        return [functools.partial(step, batch) for batch in self.batches]

    def inference_of(self, formulation: Formulation) -> list[Call]:
        """Embeddings of every modality, or class scores, (B, ...).

        The model is put in evaluation mode, its optimizer forgets its state.
        """
        self.model.eval()
        self.optimizer.state.clear()

        def outputs_of(batch: dict[str, Tensor]) -> Tensor:
            out = self.model(**batch)
            if self.head is not None:
                return self._scores(out)
            text = out.z_text_vt.flatten(1)
            return torch.cat([out.z_video_va, out.z_audio_va, out.z_video_vt, text], 1)

        function = formulation.compiled(outputs_of)

        def infer(batch: dict[str, Tensor]) -> Tensor:
            with use_backend(formulation.backend), self.autocast(), torch.no_grad():
                return function(batch)

        return [functools.partial(infer, batch) for batch in self.batches]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _scores(self, output: VATTOutput) -> Tensor:
        assert self.head is not None
        return self.head(getattr(output, f"{self.modalities[0]}_pooled"))


@contextlib.contextmanager
def many_compilations() -> Iterator[None]:
    """One code object is compiled for one contender after the other."""
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    try:
        yield
    finally:
        torch._dynamo.config.recompile_limit = before
