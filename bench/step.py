"""``python -m bench.step``: one whole training step (forward, losses, backward, fused Adam), ours against plain formulations of the model.

The contenders train one and the same model on the same batches, in turn. Plain is the model with its ops replaced by what a user writes
today: gather first and a linear layer, torch's SDPA, a materialised NCE. Times are wall times of the step; FLOPs are the model's, three times
the forward pass (``floors.step_flops``). ``bench.drop_rate`` measures the paper's configurations with these parts, and inference too.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vatt_fast.losses
import vatt_fast.model
from vatt_fast.config import PRESETS, SHORT_NAMES, VATTConfig, preset
from vatt_fast.kernels import dispatch, use_backend
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT, VATTOutput

from . import peers, results
from .floors import MODALITIES, Mode, step_flops
from .machine import DTYPES
from .race import Contender, Task, compare
from .results import Line
from .setting import Setting, gate

_BATCHES = 2  # rotated through
CLASSES = 600  # of a classifier: Kinetics-600's, the tower that Table 7 counts

# -- contenders --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """The model on plain torch: its modules' ops replaced while the block runs."""
    places: list[tuple[Any, str, Callable]] = [
        (
            vatt_fast.model,
            "attention",
            lambda *args, **options: (peers.sdpa(*args, **options)[0], None),
        ),
        (
            vatt_fast.model,
            "patch_embed",
            lambda *args, **options: peers.gather_first(*args, **options)[0],
        ),
        (vatt_fast.losses, "contrastive_lse", peers.materialised),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)


@dataclasses.dataclass(frozen=True)
class Formulation:
    """How one contender runs the model."""

    name: str
    context: Callable[[], contextlib.AbstractContextManager]
    ours: bool
    compile: str | None = None  # a mode of torch.compile

    def compiled(self, function: Callable) -> Callable:
        return (
            torch.compile(function, dynamic=False, mode=self.compile) if self.compile else function
        )

    def describe(self) -> str:
        return (
            f"{self.name}_compiled"
            if self.compile == "default"
            else f"{self.name}_{self.compile}"
            if self.compile
            else self.name
        )


def formulations(names: tuple[str, ...], compile_modes: tuple[str, ...]) -> list[Formulation]:
    """Each of ``names`` (auto, reference, plain) eager and under each mode of torch.compile."""
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
        "auto": lambda: use_backend(""),
        "reference": lambda: use_backend("reference"),
        "plain": plain_ops,
    }
    if unknown := sorted(set(names) - set(contexts)):
        raise ValueError(
            f"unknown formulations {', '.join(unknown)}; there are {', '.join(contexts)}"
        )
    return [
        Formulation(name, contexts[name], name == "auto", mode)
        for name in names
        for mode in (None, *compile_modes)
    ]


class Trainer:
    """A model with its optimizer and batches; ``step_of`` and ``inference_of`` make the calls that one contender is timed by.

    With all modalities it is pre-trained. With one alone, that tower is a classifier in fine-tuning; make the towers that never run small.
    """

    def __init__(
        self,
        config: VATTConfig,
        batch: int,
        drop_rate: float,
        device: torch.device,
        dtype: torch.dtype,
        modalities: tuple[str, ...] = MODALITIES,
    ):
        self.config, self.device, self.dtype, self.modalities = config, device, dtype, modalities
        torch.manual_seed(0)
        self.model = VATT(config).to(device)
        self.head = (
            None
            if modalities == MODALITIES
            else nn.Linear(config.pooled_dim(*modalities), CLASSES, device=device)
        )
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        trainable += [] if self.head is None else self.head.parameters()
        self.optimizer = torch.optim.Adam(trainable, lr=1e-5, fused=True)
        self.set_batch(batch, drop_rate)

    def set_batch(self, batch: int, drop_rate: float) -> None:
        self.batches = [
            make_batch(self.model, batch, drop_rate, self.device, seed, self.modalities)
            for seed in range(_BATCHES)
        ]

    def step_of(self, formulation: Formulation, features: bool) -> list[Callable[[], Tensor]]:
        """Training steps, each returning its loss; the model is put in training mode."""
        self.model.train()

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            output = self.model(**batch, features=features)
            loss = self._loss(output)
            if features:  # they are asked for by something: a head on them
                loss = loss + 0.0 * sum(
                    getattr(output, f"{each}_features").float().mean() for each in self.modalities
                )
            return loss

        function = formulation.compiled(loss_of)

        def step(batch: dict[str, Tensor]) -> Tensor:
            self.optimizer.zero_grad(
                set_to_none=True
            )  # first: the last step's gradients would lie beside this one's activations
            with formulation.context():
                with self.autocast():
                    loss = function(batch)
                loss.backward()
                self.optimizer.step()
            return loss.detach()

        return [functools.partial(step, batch) for batch in self.batches]

    def inference_of(self, formulation: Formulation) -> list[Callable[[], Tensor]]:
        """Embeddings of every modality, or class scores, (B, ...); the model is put in evaluation mode, its optimizer forgets."""
        self.model.eval()
        self.optimizer.state.clear()

        def outputs_of(batch: dict[str, Tensor]) -> Tensor:
            output = self.model(**batch)
            if self.head is not None:
                return self._scores(output)
            return torch.cat(
                [
                    output.z_video_va,
                    output.z_audio_va,
                    output.z_video_vt,
                    output.z_text_vt.flatten(1),
                ],
                1,
            )

        function = formulation.compiled(outputs_of)

        def infer(batch: dict[str, Tensor]) -> Tensor:
            with formulation.context(), self.autocast(), torch.no_grad():
                return function(batch)

        return [functools.partial(infer, batch) for batch in self.batches]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _scores(self, output: VATTOutput) -> Tensor:
        assert self.head is not None
        return self.head(getattr(output, f"{self.modalities[0]}_pooled"))

    def _loss(self, output: VATTOutput) -> Tensor:
        if self.head is None:
            return vatt_loss(output, self.config, scale=self.model.scale()).total
        return classification_loss(self._scores(output))


def classification_loss(scores: Tensor) -> Tensor:
    """Cross-entropy of class scores (B, classes) for some labels."""
    return F.cross_entropy(
        scores.float(), torch.arange(len(scores), device=scores.device) % scores.shape[1]
    )


def make_batch(
    model: VATT,
    batch: int,
    drop_rate: float,
    device: torch.device,
    seed: int,
    modalities: tuple[str, ...] = MODALITIES,
) -> dict[str, Tensor]:
    """uint8 video patches, float audio patches and word ids, as a loader leaves them on the device, and the kept indices of the step."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, c.vocab_size, (batch, c.texts_per_clip, c.words), generator=generator)
    lengths = torch.randint(1, c.words + 1, (batch, c.texts_per_clip, 1), generator=generator)
    text *= torch.arange(c.words) < lengths  # padding behind
    on_device: dict[str, Tensor] = {
        "video": torch.randint(
            0,
            256,
            (batch, c.num_video_patches, c.video_patch_values),
            dtype=torch.uint8,
            generator=generator,
        ),
        "audio": torch.rand(batch, c.num_audio_patches, c.audio_patch, generator=generator) * 2 - 1,
        "text": text,
    }
    if drop_rate:
        on_device |= model.sample_keep(drop_rate, seed=0, step=seed)
    return {
        name: value.to(device)
        for name, value in on_device.items()
        if name.partition("_")[0] in modalities
    }


# -- measurement -------------------------------------------------------------------------------------------------------


def measure_step(
    setting: Setting,
    trainer: Trainer,
    name: str,
    batch: int,
    drop_rate: float,
    contenders: list[Formulation],
    *,
    features: bool,
) -> tuple[list[Line], dict[str, str]]:
    """Lines of the contenders at one drop rate, and {contender: reason} of those that failed."""
    trainer.set_batch(batch, drop_rate)
    task = task_of(
        trainer,
        f"{name}_drop{round(100 * drop_rate)}_b{batch}{'_features' if features else ''}",
        "fwd+bwd",
        batch,
        drop_rate,
        features,
    )
    return compare(
        setting,
        task,
        {
            each.describe(): Contender(
                each.ours, functools.partial(trainer.step_of, each, features)
            )
            for each in contenders
        },
        between=functools.partial(trainer.optimizer.zero_grad, set_to_none=True),
    )


def task_of(
    trainer: Trainer, case: str, mode: Mode, batch: int, drop_rate: float, features: bool = False
) -> Task:
    flops = step_flops(
        trainer.config,
        batch,
        drop_rate,
        features=features,
        mode=mode,
        modalities=trainer.modalities,
    )
    dtype = next(key for key, value in DTYPES.items() if value == trainer.dtype)
    return Task(
        case, mode, dtype, batch, drop_rate, flops, trainer.config.dropout if mode != "fwd" else 0.0
    )


def fitting_batch(
    trainer: Trainer, drop_rate: float, start: int, features: bool, contenders: list[Formulation]
) -> int:
    """The largest of start, start / 2, ... at which every eager contender's step fits the device.

    Raises:
        torch.OutOfMemoryError: not even one clip fits.
    """
    batch = start
    while True:
        try:
            trainer.set_batch(batch, drop_rate)
            for formulation in contenders:
                if formulation.compile is None:
                    trainer.step_of(formulation, features)[0]()
            return batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def describe(line: Line) -> str:
    ratio = (
        ""
        if line.speedup_over_best_peer is None
        else f"  {line.speedup_over_best_peer:.2f}x best peer ({line.best_peer})"
    )
    speed = (
        "another model"
        if line.tflops is None
        else f"{line.tflops:8.2f} TFLOP/s {line.share_of_ceiling:6.1%} of the matmul ceiling"
    )
    return (
        f"{line.case:34} {line.dtype} {'*' if line.ours else ' '}{line.backend:28} {line.ms_p50:10.2f} ms ({line.ms_p20:.2f}..{line.ms_p80:.2f}) "
        f"{line.clips_per_second:9.2f} clips/s {speed}  "
        f"peak {(line.peak_bytes or 0) / 2**20:9.1f} MiB{ratio}"
    )


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="time a whole training step against plain formulations of the model"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--preset", default="mbs" if cuda else "tiny", choices=[*PRESETS, *SHORT_NAMES]
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        help="clips; 0 on a GPU: the largest power of two up to 256 that fits all",
    )
    parser.add_argument("--drop-rate", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument(
        "--features",
        nargs="+",
        choices=["no", "yes"],
        default=["no"],
        help="yes: the last block works for all tokens",
    )
    parser.add_argument("--contenders", nargs="+", default=["auto", "reference", "plain"])
    parser.add_argument(
        "--compile",
        nargs="*",
        default=["default"],
        help="modes of torch.compile beside eager; none for eager alone",
    )
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="append result lines to this file")
    given = parser.parse_args()
    try:
        contenders = formulations(tuple(given.contenders), tuple(given.compile))
    except ValueError as error:
        parser.error(str(error))
    setting = Setting(
        torch.device(given.device), clock="perf_counter", rounds=given.rounds, warmup=1
    )
    gate(setting, dispatch.OPS, given.dtype, chosen_only=True)
    if reason := setting.refusal():
        raise SystemExit(f"nothing is timed: {reason}")
    trainer = Trainer(preset(given.preset), 1, 0.5, setting.device, DTYPES[given.dtype])
    status = 0
    for drop_rate in given.drop_rate:
        for features in (each == "yes" for each in given.features):
            batch = given.batch or (
                fitting_batch(trainer, drop_rate, 256, features, contenders)
                if given.device == "cuda"
                else 4
            )
            lines, absent = measure_step(
                setting, trainer, given.preset, batch, drop_rate, contenders, features=features
            )
            for line in lines:
                print(describe(line), flush=True)
            for title, reason in absent.items():
                print(f"failed: {title}: {reason}", flush=True)
                status = 1
            if given.out:
                results.append(given.out, lines)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
