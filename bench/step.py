"""``python -m bench.step``: one whole training step (forward, losses, backward, fused Adam), ours against plain formulations of the model.

The contenders train one and the same model on the same batches, in turn. Plain is the model with its ops replaced by what a user writes
today: gather first and a linear layer, torch's SDPA, a materialised NCE. Times are wall times of the step; peak memory is everything
allocated, weights and optimizer state included. FLOPs are the model's, three times the forward pass (``floors.step_flops``).
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vatt_fast.losses
import vatt_fast.model
from vatt_fast.config import PRESETS, SHORT_NAMES, VATTConfig, preset
from vatt_fast.kernels import use_backend
from vatt_fast.losses import vatt_loss
from vatt_fast.model import VATT

from . import machine, peers, results
from .floors import step_flops
from .machine import DTYPES
from .results import Line
from .run import Setting
from .timer import HostClock, first_line, interleaved, peak_bytes

_BATCHES = 2  # rotated through

# -- contenders --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """The model on plain torch: its modules' ops replaced while the block runs."""
    places: list[tuple[Any, str, Callable]] = [
        (vatt_fast.model, "attention", lambda *args, **options: (peers.sdpa(*args, **options)[0], None)),
        (vatt_fast.model, "patch_embed", lambda *args, **options: peers.gather_first(*args, **options)[0]),
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

    def describe(self) -> str:
        return f"{self.name}_compiled" if self.compile == "default" else f"{self.name}_{self.compile}" if self.compile else self.name


def formulations(names: tuple[str, ...], compile_modes: tuple[str, ...]) -> list[Formulation]:
    """Each of ``names`` (auto, reference, plain) eager and under each mode of torch.compile."""
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
        "auto": lambda: use_backend(""),
        "reference": lambda: use_backend("reference"),
        "plain": plain_ops,
    }
    if unknown := sorted(set(names) - set(contexts)):
        raise ValueError(f"unknown formulations {', '.join(unknown)}; there are {', '.join(contexts)}")
    return [Formulation(name, contexts[name], name == "auto", mode) for name in names for mode in (None, *compile_modes)]


class Trainer:
    """A model with its optimizer and batches; ``step_of`` makes the call that one contender is timed by."""

    def __init__(self, config: VATTConfig, batch: int, drop_rate: float, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        torch.manual_seed(0)
        self.model = VATT(config).to(device).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, lr=1e-5, fused=device.type == "cuda")
        self.set_batch(batch, drop_rate)

    def set_batch(self, batch: int, drop_rate: float) -> None:
        self.batches = [make_batch(self.model, batch, drop_rate, self.device, seed) for seed in range(_BATCHES)]

    def step_of(self, formulation: Formulation, features: bool) -> list[Callable[[], Tensor]]:
        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            output = self.model(**batch, features=features)
            loss = vatt_loss(output, self.config, scale=self.model.scale()).total
            if features:  # they are asked for by something: a head on them
                loss = loss + 0.0 * sum(getattr(output, f"{each}_features").float().mean() for each in ("video", "audio", "text"))
            return loss

        function = torch.compile(loss_of, dynamic=False, mode=formulation.compile) if formulation.compile else loss_of

        def step(batch: dict[str, Tensor]) -> Tensor:
            with formulation.context():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss = function(batch)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
            return loss.detach()

        return [functools.partial(step, batch) for batch in self.batches]


def make_batch(model: VATT, batch: int, drop_rate: float, device: torch.device, seed: int) -> dict[str, Tensor]:
    """uint8 video patches, float audio patches and word ids, as a loader leaves them on the device, and the kept indices of the step."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, c.vocab_size, (batch, c.texts_per_clip, c.words), generator=generator)
    lengths = torch.randint(1, c.words + 1, (batch, c.texts_per_clip, 1), generator=generator)
    text *= torch.arange(c.words) < lengths  # padding behind
    on_device: dict[str, Tensor] = {
        "video": torch.randint(0, 256, (batch, c.num_video_patches, c.video_patch_values), dtype=torch.uint8, generator=generator),
        "audio": torch.rand(batch, c.num_audio_patches, c.audio_patch, generator=generator) * 2 - 1,
        "text": text,
    }
    if drop_rate:
        on_device |= model.sample_keep(drop_rate, seed=0, step=seed)
    return {name: value.to(device) for name, value in on_device.items()}


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
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # one code object, a contender after the other
    trainer.set_batch(batch, drop_rate)
    calls, peaks, absent = {}, {}, {}
    for formulation in contenders:
        title = formulation.describe()
        try:
            steps = trainer.step_of(formulation, features)
            if not torch.isfinite(steps[0]()):
                raise FloatingPointError("the loss is not finite")
            peaks[title] = _step_peak(steps[0], setting.device)
            calls[title] = steps
        except Exception as error:
            absent[title] = first_line(error)
        trainer.optimizer.zero_grad(set_to_none=True)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    times = interleaved(
        calls, rounds=setting.rounds, warmup=setting.warmup, clock=HostClock(setting.device), failed=absent, deadline=setting.deadline
    )
    dtype = next(key for key, value in DTYPES.items() if value == trainer.dtype)
    ceilings = setting.ceilings_of(dtype)
    flops = step_flops(trainer.config, batch, drop_rate, features=features)
    theirs = [times[each.describe()] for each in contenders if not each.ours and each.describe() in times]
    best = min(theirs, key=lambda timing: timing.p50, default=None)
    lines = []
    for formulation in contenders:
        title = formulation.describe()
        if title not in times:
            continue
        timing = times[title]
        tflops = flops / timing.p50 / 1e9
        lines.append(
            Line(
                op="step",
                case=f"{name}_drop{round(100 * drop_rate)}_b{batch}{'_features' if features else ''}",
                dtype=dtype,
                mode="fwd+bwd",
                backend=title,
                ours=formulation.ours,
                ms_p20=timing.p20,
                ms_p50=timing.p50,
                ms_p80=timing.p80,
                rounds=len(timing.ms),
                clock=HostClock.name,
                peak_bytes=peaks[title],
                tflops=tflops,
                gb_per_s=None,
                share_of_ceiling=tflops / ceilings.tflops,
                error=None,
                error_of=None,
                error_batch=None,
                device=setting.device_name,
                versions=setting.versions,
                commit=machine.commit(),
                date=machine.today(),
                dropout=trainer.config.dropout,
                drop_rate=drop_rate,
                speedup_over_best_peer=timing.speedup_over(best) if formulation.ours and best else None,
                clips_per_second=1e3 * batch / timing.p50,
            )
        )
    return lines, absent


def _step_peak(step: Callable, device: torch.device) -> int:
    """Everything allocated at the peak of a step on a GPU; on the CPU what the step allocates beyond weights and state."""
    if device.type != "cuda":
        return peak_bytes(step, device)
    before = torch.cuda.memory_allocated(device)
    return before + peak_bytes(step, device)


def fitting_batch(trainer: Trainer, drop_rate: float, start: int, features: bool, contenders: list[Formulation]) -> int:
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
    ratio = "" if line.speedup_over_best_peer is None else f"  {line.speedup_over_best_peer:.2f}x best peer"
    return (
        f"{line.case:34} {line.dtype} {'*' if line.ours else ' '}{line.backend:28} {line.ms_p50:10.2f} ms ({line.ms_p20:.2f}..{line.ms_p80:.2f}) "
        f"{line.clips_per_second:9.2f} clips/s {line.tflops:8.2f} TFLOP/s {line.share_of_ceiling:6.1%} of the matmul ceiling  "
        f"peak {(line.peak_bytes or 0) / 2**20:9.1f} MiB{ratio}"
    )


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="time a whole training step against plain formulations of the model")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="mbs" if cuda else "tiny", choices=[*PRESETS, *SHORT_NAMES])
    parser.add_argument("--batch", type=int, default=0, help="clips; 0 on a GPU: the largest power of two up to 256 that fits all")
    parser.add_argument("--drop-rate", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--features", nargs="+", choices=["no", "yes"], default=["no"], help="yes: the last block works for all tokens")
    parser.add_argument("--contenders", nargs="+", default=["auto", "reference", "plain"])
    parser.add_argument("--compile", nargs="*", default=["default"], help="modes of torch.compile beside eager; none for eager alone")
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="append result lines to this file")
    given = parser.parse_args()
    try:
        contenders = formulations(tuple(given.contenders), tuple(given.compile))
    except ValueError as error:
        parser.error(str(error))
    setting = Setting(torch.device(given.device), clock="perf_counter", rounds=given.rounds, warmup=1)
    trainer = Trainer(preset(given.preset), 1, 0.5, setting.device, DTYPES[given.dtype])
    status = 0
    for drop_rate in given.drop_rate:
        for features in (each == "yes" for each in given.features):
            batch = given.batch or (fitting_batch(trainer, drop_rate, 256, features, contenders) if given.device == "cuda" else 4)
            lines, absent = measure_step(setting, trainer, given.preset, batch, drop_rate, contenders, features=features)
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
