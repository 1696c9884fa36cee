"""Pre-training: folder of clips in, run folder out; may be killed at any time and continued."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tqdm import tqdm

from ..config import VATTConfig, preset
from ..data.dataset import Batch, ClipDataset, ClipSpec, folder_captions, loader
from ..data.text import PADDING, UNKNOWN, Vocabulary, split_words
from ..kernels.dispatch import native_bf16
from ..losses import VATTLoss, vatt_loss
from ..model import VATT
from ..on_jax.compile_tpu import has_a_tpu, without_a_tpu
from ..weights import save_model
from .checkpoint import load_checkpoint, save_checkpoint
from .schedule import Schedule, learning_rate

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
BETAS = (0.9, 0.999)  # Adam's
# a run may continue with other values of these; everything else must be as it was
_FREE = (
    "out",
    "workers",
    "framework",
    "shard_weights",
    "recompute",
    "device",
    "log_every",
    "checkpoint_every",
    "cache",
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run. All defaults but the preset follow the paper (section 4.1 and appendix); a laptop wants smaller batches, fewer
    steps and a higher learning rate (``vatt-fast demo`` has 32 clips, 1000 steps, 1.5e-3)."""

    data: str  # folder of media files; with captions.json, or video and audio alone are trained
    out: str  # run folder: config.json, model.safetensors, vocabulary.txt, checkpoint.safetensors, metrics.jsonl, TensorBoard events
    preset: str = "tiny"  # base_base_small (bbs), medium_base_small (mbs), large_base_small (lbs), agnostic_medium (ma) or tiny
    recipe: Literal["paper", "released"] = "paper"
    steps: int = 500_000
    batch_size: int = 2048
    drop_rate: float = 0.5  # fraction of video and audio patches removed by DropToken
    drop_per: Literal["batch", "clip"] = "batch"
    learning_rate: float = 1e-4
    final_learning_rate: float = 5e-5
    warmup_steps: int = 10_000
    schedule: Schedule = "quarter_cosine"
    adam_eps: float = 1e-8
    max_words: int = 65536  # size of the vocabulary built from the captions
    seed: int = 0
    shuffle_captions: bool = (
        False  # train on captions of other clips: retrieval must then stay near chance
    )
    precision: Literal["auto", "bf16", "fp32"] = (
        "auto"  # auto: bf16 autocast where the device computes it natively
    )
    framework: Literal["torch", "jax"] = "torch"  # jax: all devices of this host share the batch
    shard_weights: bool = False  # jax: weights and Adam's state lie in shards over the devices
    recompute: bool = False  # jax: keep only the blocks' inputs for the backward pass
    device: str = "auto"
    workers: int = 2
    cache: str | None = None  # keep decoded clips here; for small data sets that fit the disk
    log_every: int = 10
    checkpoint_every: int = 500

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(
                f"drop_rate is {self.drop_rate}; it is the fraction removed and lies in [0, 1)"
            )
        if self.framework not in ("torch", "jax"):
            raise ValueError(f"framework is {self.framework!r}; it is torch or jax")
        if self.framework == "torch" and (self.shard_weights or self.recompute):
            raise ValueError(
                "shard_weights and recompute belong to framework 'jax'; leave them out"
            )


def pretrain(
    run: PretrainConfig, *, model_config: VATTConfig | None = None, progress: bool = True
) -> VATT:
    """Run or continue a pre-training; returns the trained model.

    Writes a checkpoint every ``checkpoint_every`` steps, at the end, and on SIGINT or SIGTERM (then raises KeyboardInterrupt). Called
    again with the same settings it continues there, with the same batches and the same DropToken draws as an uninterrupted run.

    Args:
        model_config: instead of ``run.preset`` and ``run.recipe``; vocab_size is replaced by the captions' vocabulary.

    Raises:
        ValueError: settings out of range, unreadable data, or an output folder of another run.
    """
    out = Path(run.out)
    if run.warmup_steps >= run.steps:
        warnings.warn(
            f"warmup_steps {run.warmup_steps} >= steps {run.steps}: the learning rate never reaches {run.learning_rate:g}",
            stacklevel=2,
        )
    vocabulary = vocabulary_of(run.data, run.max_words)
    config = dataclasses.replace(
        model_config or preset(run.preset, run.recipe), vocab_size=len(vocabulary)
    )
    dataset = ClipDataset(
        run.data,
        ClipSpec.from_config(config),
        vocabulary=vocabulary,
        batch_size=run.batch_size,
        seed=run.seed,
        shuffle_captions=run.shuffle_captions,
        cache_dir=run.cache,
    )
    trainer = _trainer(run, config, vocabulary)
    identity = describe(run, config)
    start = trainer.restore(out / CHECKPOINT, identity) if (out / CHECKPOINT).exists() else 0
    out.mkdir(parents=True, exist_ok=True)
    logger = MetricsLog(out, start)

    batches = loader(dataset, start, run.steps, run.workers, start_method=trainer.start_method)
    bar = tqdm(
        total=run.steps,
        initial=start,
        desc="pretrain",
        unit="step",
        disable=None if progress else True,
    )
    began, clips = time.perf_counter(), 0
    with contextlib.closing(logger), bar, stop_requests() as stopping:
        for step, batch in enumerate(batches, start):
            rate = _rate(run, step)
            loss = trainer.step(batch, step, rate)
            clips += len(batch)
            bar.update()
            done = step + 1
            if done % run.log_every == 0 or done == run.steps:
                values = {"loss": float(loss.total), "learning_rate": rate}
                values |= {
                    f"loss_{name}": float(part)
                    for name in ("va", "vt")
                    if (part := getattr(loss, name)) is not None
                }
                values |= {
                    "temperature": trainer.temperature(),
                    "skipped_files": len(dataset.skipped),
                }
                values["clips_per_second"] = clips / (time.perf_counter() - began)
                logger.write(done, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                began, clips = time.perf_counter(), 0
            if done % run.checkpoint_every == 0 or done == run.steps or stopping.is_set():
                save_model(trainer.save(out / CHECKPOINT, done, identity), out)
            if stopping.is_set() and done < run.steps:
                raise KeyboardInterrupt(
                    f"stopped after step {done}; the same command continues from there"
                )
    if dataset.skipped:
        reasons = "\n  ".join(list(dataset.skipped.values())[:5])
        print(
            f"{len(dataset.skipped)} media files could not be read, others stood in for them:\n  {reasons}"
        )
    return trainer.model().eval()


class Trainer(Protocol):
    """What a framework brings to ``pretrain``: a model from the run's seed, its optimizer, and their state on disk."""

    start_method: str | None  # of the loader's worker processes; None: Python's default

    def restore(self, path: Path, identity: dict) -> int:
        """Continue from a checkpoint; returns the number of steps done."""

    def step(self, batch: Batch, step: int, rate: float) -> Any:
        """One update; the loss as an object with ``total``, ``va``, ``vt``, whose values may still be on their way."""

    def temperature(self) -> float: ...

    def save(self, path: Path, step: int, identity: dict) -> VATT:
        """Write a checkpoint; returns the model as it stands."""

    def model(self) -> VATT: ...


def _trainer(run: PretrainConfig, config: VATTConfig, vocabulary: Vocabulary) -> Trainer:
    if run.framework == "jax":
        if not has_a_tpu():
            without_a_tpu(
                jax_on_cpu=False
            )  # where libtpu is installed to compile with, JAX would look for one, and say so at length
        try:
            from ..on_jax.training import JaxTrainer
        except ModuleNotFoundError as error:
            raise ValueError(
                f"framework 'jax' needs {error.name}: pip install 'vatt_fast[jax]'"
            ) from error
        return JaxTrainer(run, config, vocabulary)
    return TorchTrainer(run, config, vocabulary)


class TorchTrainer:
    """The torch model on one device."""

    start_method: str | None = None

    def __init__(self, run: PretrainConfig, config: VATTConfig, vocabulary: Vocabulary):
        self.run, self.device = run, pick_device(run.device)
        self.autocast = _autocast(run.precision, self.device)
        self._model = initial_model(config, vocabulary, run.seed).to(self.device).train()
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            trainable, lr=0.0, betas=BETAS, eps=run.adam_eps, fused=True
        )

    def restore(self, path: Path, identity: dict) -> int:
        return load_checkpoint(path, self._model, self.optimizer, run=identity)

    def step(self, batch: Batch, step: int, rate: float) -> VATTLoss:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = train_step(
            self._model, self.optimizer, batch.to(self.device), self.run, step, self.autocast
        )
        va, vt = (None if part is None else part.detach() for part in (loss.va, loss.vt))
        return VATTLoss(loss.total.detach(), va, vt)

    def temperature(self) -> float:
        return 1 / float(torch.as_tensor(self._model.scale()).detach())

    def save(self, path: Path, step: int, identity: dict) -> VATT:
        save_checkpoint(path, self._model, self.optimizer, step=step, run=identity)
        return self._model

    def model(self) -> VATT:
        return self._model


def train_step(
    model: VATT,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    run: PretrainConfig,
    step: int,
    autocast,
) -> VATTLoss:
    """One update on one batch: draw DropToken, forward, loss, backward, Adam."""
    if model.config.dropout:
        torch.manual_seed(run.seed * 1_000_003 + step)  # a continued run draws the same dropout
    keep = model.sample_keep(
        run.drop_rate, seed=run.seed, step=step, per=run.drop_per, batch=batch.video.shape[0]
    )
    valid = dict(
        video_valid=batch.video_valid, audio_valid=batch.audio_valid, text_valid=batch.text_valid
    )
    optimizer.zero_grad(
        set_to_none=True
    )  # first: the last step's gradients would lie beside this one's activations
    with autocast:
        output = model(batch.video, batch.audio, batch.text, **keep, **valid)
        loss = vatt_loss(output, model.config, scale=model.scale(), **valid)
    loss.total.backward()
    optimizer.step()
    model.clamp_temperature()
    return loss


def initial_model(config: VATTConfig, vocabulary: Vocabulary, seed: int) -> VATT:
    """The model a run with this seed starts from; leaves the caller's random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VATT(config)
    model.vocabulary = vocabulary
    return model


def vocabulary_of(folder: str | Path, max_words: int) -> Vocabulary:
    """The most frequent words of a folder's captions; only padding and the unknown word where there are none."""
    sentences = [
        caption.text for entries in folder_captions(folder).values() for caption in entries
    ]
    return (
        Vocabulary.build(sentences, max_words)
        if any(map(split_words, sentences))
        else Vocabulary([PADDING, UNKNOWN])
    )


def describe(run: PretrainConfig, config: VATTConfig) -> dict[str, Any]:
    """What a continued run must share with the one that wrote the checkpoint."""
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in _FREE}
    return json.loads(json.dumps(settings | {"model": dataclasses.asdict(config)}))


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but this torch sees no CUDA device; use 'cpu' or 'auto'"
        )
    return device


def _autocast(precision: str, device: torch.device):
    enabled = precision == "bf16" or (precision == "auto" and native_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _rate(run: PretrainConfig, step: int) -> float:
    # the paper counts from 0; from 1 spares the first step a rate of 0
    return learning_rate(
        step + 1,
        peak=run.learning_rate,
        final=run.final_learning_rate,
        warmup_steps=run.warmup_steps,
        total_steps=run.steps,
        schedule=run.schedule,
    )


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM, so that a run can end between two steps. A second signal acts at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before: dict[int, Any] = {}

    def request(number, frame):
        stopping.set()
        signal.signal(number, before[number])

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, request)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class MetricsLog:
    """metrics.jsonl (one line a logged step) and TensorBoard events; a continued run drops lines beyond its checkpoint."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS
        whole_lines = (
            path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        )  # a killed run may leave half a line
        kept = [line for line in whole_lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()
