"""The settings of a pre-training run, which both frameworks read."""

import dataclasses
import json
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..config import AudioInput, VATTConfig
from ..data.augment import NOTHING, parts_of
from ..data.torchcodec_reader import Decoder
from ..recompute import Recompute
from .loggers import names_of
from .schedule import Schedule, learning_rate

T = TypeVar("T")
BETAS = (0.9, 0.999)  # Adam's
# a run may continue with other values of these; everything else must be as it was
_FREE = (
    "data",  # what it holds counts, not how the folder is spelled: ``Data`` in checkpoint.py
    "out",
    "workers",
    "framework",
    "shard_weights",
    "recompute",
    "compile",
    "micro_batch",
    "strategy",
    "drop_draws",  # the checkpoint holds it
    "patience",
    "coordinator",
    "processes",
    "process",
    "device",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "words",  # the checkpoint holds the table
    "init",
    "cache",
    "loggers",
    "eval_data",
    "eval_every",
    "best_by",
)
# settings younger than some checkpoints, whose default is not what those runs did
_ONCE = {"augment": NOTHING}
_SIZES = ("frames", "height", "width", "samples", "audio_patch")
_INPUT = (*_SIZES, "video_patch", "audio_input")
# by recipe: appendix of the paper; the released code's pre-training (its Keras eps lies elsewhere)
_BY_RECIPE: dict[str, dict[str, Any]] = {
    "paper": dict(warmup_steps=10_000, schedule="quarter_cosine", adam_eps=1e-8),
    "released": dict(warmup_steps=5_000, schedule="half_cosine", adam_eps=1e-7),
}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run.

    All defaults but the preset follow the paper (section 4.1 and appendix). A laptop wants smaller
    batches, fewer steps and a higher learning rate (``vatt-fast demo`` has 32 clips, 1000 steps,
    1.5e-3). What is None becomes what its comment says.

    Raises:
        ValueError: a setting that is out of range or none of its words.
    """

    # The comments are the options' help. One above a field holds until the next empty line.

    # folder of media files, folder/** for all below, manifest (.csv, .tsv, .parquet), tar shards
    # (folder or shards/{000..099}.tar), or several: a,b:0.3 or a .toml. Without captions video and
    # audio alone are trained.
    data: str

    # run folder: config.json, model.safetensors, vocabulary.txt, checkpoint.safetensors,
    # metrics.jsonl, report.html, TensorBoard events
    out: str

    # base_base_small (bbs), medium_base_small (mbs), large_base_small (lbs), agnostic_medium (ma)
    # or tiny
    preset: str = "tiny"

    recipe: Literal["paper", "released"] = "paper"  # the paper's choices, or the released code's
    steps: int = 500_000  # updates in all
    batch_size: int = 2048  # clips of a step
    drop_rate: float = 0.5  # fraction of video and audio patches removed by DropToken
    drop_per: Literal["batch", "clip"] = "batch"  # whether the clips of a batch share a draw
    learning_rate: float = 1e-4  # after the warm-up
    final_learning_rate: float | None = None  # at the last step; None: half of learning_rate
    warmup_steps: int | None = None  # None: by recipe 10000 (paper) or 5000 (released)
    schedule: Schedule | None = None  # None: quarter_cosine (paper) or half_cosine (released)
    adam_eps: float | None = None  # None: by recipe 1e-8 (paper) or 1e-7 (released)
    max_words: int = 65536  # size of the vocabulary built from the captions, or read from words

    # word vectors for the word table, and their vocabulary instead of the captions': word2vec text
    # or binary, GloVe text, or the release's word2vec.pkl beside howto100m_en.txt
    words: str | None = None

    init: str | None = None  # saved model or run folder to start from; preset, recipe, words: its
    frames: int | None = None  # of a clip; None: the preset's; so the next six
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    samples: int | None = None  # of a waveform
    video_patch: tuple[int, int, int] | None = None  # frames, rows, columns of a patch
    audio_patch: int | None = None  # samples of a patch of a waveform
    audio_input: AudioInput | None = None  # waveform, or spectrogram: its log-mel spectrogram
    seed: int = 0  # of the weights, the order of clips, windows, DropToken and dropout
    shuffle_captions: bool = False  # captions of other clips: retrieval must stay near chance

    # recipe: crop,flip,colour (paper) or jitter_crop,flip,colour,noise (released); none; or some of
    # these, joined by commas
    augment: str = "recipe"

    # steps in a row that take a window each of a file that is opened once: less decoding of short
    # clips, for so many times the memory of batches
    windows_per_decode: int = 1

    decoder: Decoder = "pyav"  # of pictures; torchcodec: where it is installed and loads
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device computes it
    framework: Literal["torch", "jax"] = "torch"  # jax: all devices share the batch
    shard_weights: bool = False  # jax: weights and Adam's state lie in shards over the devices

    # jax, several hosts without torchrun: host:port of process 0, how many processes, and which
    # this is, from 0. None: as JAX finds them (SLURM, TPU pods)
    coordinator: str | None = None

    processes: int | None = None  # see coordinator
    process: int | None = None  # see coordinator

    # torch, several processes (torchrun): ddp: each holds all weights; fsdp2: weights, gradients
    # and Adam's state lie in shards; auto: ddp where they fill a quarter of the device at most
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"

    # draws of DropToken that the clips of a step share, so many parts of it each; None: one a
    # device. Another number of devices keeps what the run began with
    drop_draws: int | None = None

    patience: int = 600  # seconds that a process waits for the others before it says who is silent

    # what the backward pass computes again instead of keeping it: blocks, of which only the inputs
    # stay; or ops (torch), all of them but attention
    recompute: Recompute = "none"

    compile: Literal["off", "blocks"] = "off"  # torch: run torch.compile on each encoder block

    # torch: clips that go through the encoders at once, twice a step; loss and gradients are the
    # whole batch's. None: all
    micro_batch: int | None = None

    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU or TPU where there is one
    workers: int = 2  # processes that read clips; 0: none
    cache: str | None = None  # keep decoded clips here; for small data sets that fit the disk
    log_every: int = 10  # steps
    checkpoint_every: int = 500  # steps
    keep_last: int = 1  # checkpoints: the newest, and so many less one before it

    # tensorboard, wandb, both joined by a comma, or none; None: tensorboard where it is installed.
    # metrics.jsonl is always written
    loggers: str | None = None

    eval_data: str | None = None  # held-out clips, as data, on which retrieval is measured
    eval_every: int | None = None  # steps; None: checkpoint_every, where eval_data is given

    # what best/ is the best by: the mean loss between two checkpoints, or R@10 on eval_data
    best_by: Literal["loss", "text_to_video", "audio_to_video"] = "loss"

    def __post_init__(self):
        self._check_words()
        defaults = _BY_RECIPE[self.recipe] | {"final_learning_rate": self.learning_rate / 2}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "augment", parts_of(self.augment, self.recipe))
        names_of(self.loggers)
        self._check_evaluation()
        names = (
            "steps", "log_every", "checkpoint_every", "keep_last", "patience", "windows_per_decode",
        )  # fmt: skip
        least = dict.fromkeys(names, 1)
        least |= {"batch_size": 2, "max_words": 1}  # one clip has no negative: no gradient either
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        if self.drop_draws is not None and (
            self.drop_draws < 1 or self.batch_size % self.drop_draws
        ):
            raise ValueError(
                f"drop_draws is {self.drop_draws}; it divides batch_size, which is "
                f"{self.batch_size}"
            )
        for name in ("warmup_steps", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("learning_rate", "final_learning_rate", "adam_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and not < 0")
        if (final := resolved(self.final_learning_rate)) > self.learning_rate:
            raise ValueError(
                f"final_learning_rate is {final:g}, learning_rate {self.learning_rate:g}; "
                "the rate falls after the warm-up: give a smaller final one"
            )
        for name in _SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.init is not None and self.words is not None:
            raise ValueError("init brings its own words; leave words out")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(
                f"drop_rate is {self.drop_rate}; it is the fraction removed and lies in [0, 1)"
            )
        if self.framework == "torch" and self.shard_weights:
            raise ValueError("shard_weights belongs to framework 'jax'; leave it out")
        check_hosts(self)
        if self.framework == "jax":
            require_jax_can(self)
            if self.strategy != "auto":
                raise ValueError("strategy belongs to framework 'torch'; jax has shard_weights")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; it must be at least 1")

    def _check_evaluation(self) -> None:
        if self.eval_data is None:
            asked = self.eval_every is not None and "eval_every"
            if asked := asked or (self.best_by != "loss" and f"best_by {self.best_by!r}"):
                raise ValueError(f"{asked} needs held-out clips; name them: eval_data")
        elif self.eval_every is None:
            object.__setattr__(self, "eval_every", self.checkpoint_every)
        elif self.eval_every < 1:
            raise ValueError(f"eval_every is {self.eval_every}; it must be at least 1")

    def _check_words(self) -> None:
        """Settings that are one of a few words are one of them."""
        for name, kind in get_type_hints(PretrainConfig).items():
            parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
            words = [get_args(part) for part in parts if get_origin(part) is Literal]
            value = getattr(self, name)
            if words and value not in words[0] and not (value is None and len(parts) > 1):
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(words[0])}")


def check_hosts(run: Any) -> None:
    """Refuse a run's coordinator, processes and process where one is missing or out of range."""
    told = {name: getattr(run, name) for name in ("coordinator", "processes", "process")}
    missing = [name for name, value in told.items() if value is None]
    if len(missing) == 3:
        return
    if run.framework == "torch":
        raise ValueError(
            "coordinator, processes and process belong to framework 'jax'; torchrun joins "
            "processes of torch"
        )
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too, or none of {', '.join(told)} where "
            "JAX finds them itself (SLURM, TPU pods)"
        )
    host, _, port = str(run.coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator is {run.coordinator!r}; it is host:port of process 0, such as host0:8476"
        )
    processes, process = resolved(run.processes), resolved(run.process)
    if not 0 <= process < processes:
        raise ValueError(
            f"process is {process} of {processes} processes; it counts from 0 to {processes - 1}"
        )


def require_jax_can(run: Any) -> None:
    """Raise ValueError where a pre-training or fine-tuning in JAX asks for what torch alone has."""
    if run.compile != "off":
        raise ValueError("compile belongs to framework 'torch'; jax always compiles its step")
    if run.recompute == "ops":
        raise ValueError("recompute 'ops' belongs to framework 'torch'; jax has 'blocks'")
    if run.micro_batch is not None:
        raise ValueError("micro_batch belongs to framework 'torch'; leave it out")


def sizes(run: PretrainConfig) -> dict[str, Any]:
    """The input that a run asks for: its sizes, its patches, and what is looked at of a sound."""
    return {name: getattr(run, name) for name in _INPUT if getattr(run, name) is not None}


def resolved(value: T | None) -> T:
    """A setting that ``PretrainConfig`` has filled in where it was None."""
    assert value is not None
    return value


def describe(run: PretrainConfig, config: VATTConfig) -> dict[str, Any]:
    """What a continued run must share with the one that wrote the checkpoint."""
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in _FREE}
    return json.loads(json.dumps(settings | {"model": dataclasses.asdict(config)}))


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How two descriptions differ: "batch_size was 4, now 8", at most a line a setting.

    A setting that is younger than the saved description was at its default then.
    """
    young = {
        each.name: each.default
        for each in dataclasses.fields(PretrainConfig)
        if each.default is not dataclasses.MISSING
    } | _ONCE
    was = {**{name: young.get(name) for name in now}, **saved}
    was = {name: value for name, value in was.items() if name not in _FREE}
    was["model"] = json.loads(VATTConfig().to_json()) | saved["model"]
    return told_differences(was, now)


def told_differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each value in which two nested dicts differ, by its name with dots."""
    told = []
    for name in sorted({*was, *now}):
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            told += told_differences(before, after, f"{prefix}{name}.")
        elif before != after:
            told.append(f"{prefix}{name} was {before!r}, now {after!r}")
    return told


def rate_of(run: PretrainConfig, step: int) -> float:
    """Learning rate of a step, from 0."""
    # the paper counts from 0; from 1 spares the first step a rate of 0
    return learning_rate(
        step + 1,
        peak=run.learning_rate,
        final=resolved(run.final_learning_rate),
        warmup_steps=resolved(run.warmup_steps),
        total_steps=run.steps,
        schedule=resolved(run.schedule),
    )
