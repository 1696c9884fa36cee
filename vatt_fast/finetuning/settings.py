"""The settings of a fine-tuning run, and the recipes that fill them in."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import VATTConfig
from ..data.augment import NOTHING, parts_of
from ..data.clips import ClipSpec
from ..files import write_text
from ..inputs import DropPer
from ..recompute import Compile, Recompute
from ..training.loggers import names_of
from ..training.schedule import Schedule, learning_rate
from ..training.settings import check_hosts, require_jax_can

Task = Literal["video", "audio", "image"]
Loss = Literal["softmax", "balanced", "sigmoid"]
RECORD = "finetune.json"
# marks of the examples that a run was trained on
TRAINED = "trained.txt"
FROM_SCRATCH = "none"
# of the tower that a task trains
MODALITY: dict[str, str] = {"video": "video", "audio": "audio", "image": "video"}
_BY_TASK = {"video": "kinetics", "audio": "audioset", "image": "imagenet"}

# What the paper (section 4 and appendix) and the released code give. Momentum 0.9, half cosine to 0
# and the clip are those of all released runs; no image run was released, so there it is the paper's
# alone. small: sizes of the model, for a laptop; ours.
_SGD = dict(momentum=0.9, schedule="half_cosine", final_learning_rate=0.0, mixup=0.0)
_ONE_CLASS = dict(loss="softmax", label_smoothing=0.1, augment="crop,flip,colour")
RECIPES: dict[str, dict[str, Any]] = {
    "kinetics": dict(
        steps=100_000, batch_size=64, learning_rate=0.005, warmup_steps=2_500, clip=0.75,
        classifier_dropout=0.5, frames=32, height=320, width=320, frames_per_second=12.5,
        **_ONE_CLASS, **_SGD,
    ),
    "audioset": dict(
        steps=50_000, batch_size=1024, learning_rate=0.2, warmup_steps=5_000, clip=0.75,
        classifier_dropout=0.0, samples=153_600, sample_rate_hz=24_000, loss="balanced",
        label_smoothing=0.0, augment=NOTHING, **_SGD | dict(mixup=5.0),
    ),
    "imagenet": dict(
        epochs=50, batch_size=512, learning_rate=0.08, warmup_steps=0, clip=0.0,
        classifier_dropout=0.0, height=384, width=384, **_ONE_CLASS, **_SGD,
    ),
    "small": dict(
        epochs=60, batch_size=16, learning_rate=0.06, clip=0.75, classifier_dropout=0.0,
        **_ONE_CLASS | dict(augment=NOTHING), **_SGD,
    ),
}  # fmt: skip
Recipe = Literal["kinetics", "audioset", "imagenet", "small"]
# a run may continue with other values of these
_FREE = (
    "data", "media", "out", "init", "skip_missing", "workers", "device", "patience", "recompute",
    "compile", "micro_batch", "cache", "log_every", "checkpoint_every", "keep_last", "loggers",
    "eval_split", "eval_every", "best_by", "epochs", "framework", "coordinator", "processes",
    "process",
)  # fmt: skip
_SIZES = ("frames", "height", "width", "frames_per_second", "samples", "sample_rate_hz")
_MODEL_SIZES = {
    "video": _SIZES[:4],
    "image": ("height", "width", "frames_per_second"),
    "audio": _SIZES[4:],
}
_WARMUP_SHARE = 0.1  # of small's steps


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """One fine-tuning run: a tower, a new classifier on its pooled output, and labelled media.

    What is None is the recipe's, or becomes what its comment says.

    Raises:
        ValueError: a setting that is out of range or none of its words.
    """

    # The comments are the options' help. One above a field holds until the next empty line.

    # folder with a folder for each class, labels.csv or labels.json, or a dataset's own label files
    # (Kinetics, Moments, ESC-50, AudioSet CSV; UCF101 and HMDB51 lists)
    data: str

    # run folder: config.json, model.safetensors, labels.txt, finetune.json,
    # checkpoint.safetensors, metrics.jsonl, report.html, TensorBoard events
    out: str

    # saved model, run folder, classifier or released checkpoint to start from; none: from scratch,
    # a random model of --preset
    init: str

    from_scratch: bool = False  # take the sizes and kinds of init's model, and random weights

    task: Task = "video"  # image: pictures, or one frame of a video
    recipe: Recipe | None = None  # None: by task kinetics, audioset or imagenet
    preset: str | None = None  # of the model, with init none

    media: str | None = None  # folder of the media that a file of labels names; None: beside it
    fold: int = 1  # of UCF101 and HMDB51 the split, of ESC-50 the fold that is the test
    skip_missing: bool = False  # leave out media that are named and not there
    hold_out: float = 0.2  # share of each class kept for evaluation, where the data name no splits

    steps: int | None = None  # updates in all; None: the recipe's, or those of epochs
    epochs: float | None = None  # passes over the training examples, instead of steps
    batch_size: int | None = None  # clips of a step
    learning_rate: float | None = None  # after the warm-up
    final_learning_rate: float | None = None  # at the last step
    warmup_steps: int | None = None  # small: a tenth of the steps
    schedule: Schedule | None = None
    momentum: float | None = None  # of SGD
    clip: float | None = None  # norm of the tower's gradient at most; 0: any. The classifier's: any
    classifier_dropout: float | None = None  # before the classifier, in training
    dropout: float | None = None  # within the tower; None: the model's

    # softmax: one class each; sigmoid: any number; balanced: so too, rare classes weigh more
    loss: Loss | None = None

    label_smoothing: float | None = None  # of softmax
    mixup: float | None = None  # a and b of the Beta distribution that mixes two examples; 0: none
    frozen: bool = False  # train the classifier alone
    drop_rate: float = 0.0  # fraction of patches removed by DropToken
    drop_per: DropPer = "batch"  # whether the clips of a batch share a draw

    # position tables of another input size: resampled once and trained so, or in each step
    positions: Literal["resampled", "on_the_fly"] = "resampled"

    frames: int | None = None  # of a clip; None: the recipe's, of small the model's; so the next
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    frames_per_second: float | None = None
    samples: int | None = None  # of a waveform
    sample_rate_hz: int | None = None
    seed: int = 0  # of the classifier, the order of clips, windows, mixup and dropout
    augment: str | None = None  # crop, flip, colour, noise, joined by commas; none

    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device computes it
    framework: Literal["torch", "jax"] = "torch"  # jax: all devices share the batch
    recompute: Recompute = "none"  # what the backward pass computes again: blocks, or ops (torch)
    compile: Compile = "off"  # torch: run torch.compile on each encoder block
    micro_batch: int | None = None  # torch: clips that go through the tower at once; None: all
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one

    # jax, several hosts without torchrun: host:port of process 0, how many processes, and which
    # this is, from 0. None: as JAX finds them (SLURM, TPU pods)
    coordinator: str | None = None

    processes: int | None = None  # see coordinator
    process: int | None = None  # see coordinator

    patience: int = 600  # seconds that a process waits for the others before it says who is silent
    workers: int = 2  # processes that read clips; 0: none
    cache: str | None = None  # keep decoded clips here; for small data sets that fit the disk
    log_every: int = 10  # steps
    checkpoint_every: int = 500  # steps
    keep_last: int = 1  # checkpoints: the newest, and so many less one before it

    # tensorboard, wandb, both joined by a comma, or none; None: tensorboard where it is installed
    loggers: str | None = None

    eval_split: str | None = None  # measured during the run, one view a clip: val, test, ...
    eval_every: int | None = None  # steps; None: checkpoint_every, where eval_split is given

    # what best/ is the best by: the mean loss between two checkpoints, or top1 (mAP where examples
    # have several classes) on eval_split
    best_by: Literal["loss", "score"] = "loss"

    def __post_init__(self) -> None:
        self._check_words()
        recipe = self.recipe or _BY_TASK[self.task]
        self._set("recipe", recipe)
        if self.task == "image" and self.frames not in (None, 1):
            raise ValueError(f"frames is {self.frames}; an image has one: leave it out")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs both say how long the run is; give one of them")
        given = self.steps is not None or self.epochs is not None
        for name, value in RECIPES[recipe].items():
            if name in ("steps", "epochs") and given:
                continue
            if name in _SIZES and name not in _MODEL_SIZES[self.task]:
                continue
            if getattr(self, name) is None:
                self._set(name, value)
        for name in _SIZES:
            if getattr(self, name) is not None and name not in _MODEL_SIZES[self.task]:
                if name == "frames" and self.task == "image":
                    continue
                raise ValueError(f"{name} does not belong to task {self.task!r}; leave it out")
        self._check_numbers()
        self._set("augment", parts_of(_given(self.augment), "paper"))
        names_of(self.loggers)
        check_hosts(self)
        if self.framework == "jax":
            require_jax_can(self)
        if (self.init == FROM_SCRATCH) != (self.preset is not None):
            raise ValueError(
                "init none starts from a random model of a preset; name it with preset"
                if self.preset is None
                else "preset belongs to init none; a saved model has its own sizes: leave it out"
            )
        if self.mixup and self.drop_rate and self.drop_per == "clip":
            raise ValueError(
                "mixup adds clips patch by patch, and drop_per clip keeps other patches of each; "
                "take drop_per batch, or mixup 0"
            )
        if self.from_scratch and self.init == FROM_SCRATCH:
            raise ValueError("from_scratch is of a saved model; name it with init, or leave it out")
        if self.frozen and (self.from_scratch or self.init == FROM_SCRATCH):
            raise ValueError("frozen trains the classifier of a random tower; name one with init")
        if self.eval_split is None:
            if self.eval_every is not None or self.best_by != "loss":
                raise ValueError("eval_every and best_by score need examples; give eval_split")
        elif self.eval_every is None:
            self._set("eval_every", self.checkpoint_every)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_words(self) -> None:
        words = {
            "task": get_args(Task),
            "recipe": (None, *RECIPES),
            "loss": (None, *get_args(Loss)),
            "schedule": (None, *get_args(Schedule)),
            "drop_per": get_args(DropPer),
            "positions": ("resampled", "on_the_fly"),
            "precision": ("auto", "bf16", "fp32"),
            "framework": ("torch", "jax"),
            "recompute": get_args(Recompute),
            "compile": get_args(Compile),
            "best_by": ("loss", "score"),
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                told = ", ".join(str(word) for word in known if word is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {told}")

    def _check_numbers(self) -> None:
        least: dict[str, float] = dict.fromkeys(
            ("steps", "batch_size", "log_every", "checkpoint_every", "keep_last", "eval_every",
             "micro_batch", "patience", *_SIZES), 1
        )  # fmt: skip
        least |= dict.fromkeys(
            ("warmup_steps", "workers", "seed", "learning_rate", "final_learning_rate", "clip",
             "mixup"), 0
        )  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be at least {minimum} and finite")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0")
        shares = ("momentum", "classifier_dropout", "dropout", "label_smoothing", "drop_rate",
                  "hold_out")  # fmt: skip
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it lies in [0, 1)")
        if _given(self.final_learning_rate) > _given(self.learning_rate):
            raise ValueError(
                f"final_learning_rate is {self.final_learning_rate:g}, learning_rate "
                f"{self.learning_rate:g}; the rate falls after the warm-up: take a smaller one"
            )

    def with_steps(self, examples: int, begun: dict[str, Any] | None = None) -> "FineTuneConfig":
        """Steps and warm-up filled in for so many training examples; ``begun``: as a run began."""
        steps, warmup = self.steps, self.warmup_steps
        if steps is None and begun is not None:
            steps = begun["steps"]
        if steps is None:
            per_epoch = max(1, examples // _given(self.batch_size))
            steps = max(1, round(_given(self.epochs) * per_epoch))
        if warmup is None:
            warmup = round(_WARMUP_SHARE * steps)
        found = dataclasses.replace(self, epochs=None, steps=steps, warmup_steps=warmup)
        return found


def _given(value: Any) -> Any:
    assert value is not None
    return value


def sizes(run: FineTuneConfig, config: VATTConfig) -> dict[str, Any]:
    """The input sizes of a run, by ``VATTConfig``'s names; those not given are the model's."""
    found = {
        name: given if (given := getattr(run, name)) is not None else getattr(config, name)
        for name in _MODEL_SIZES[run.task]
    }
    return found | ({"frames": 1} if run.task == "image" else {})


def rate_of(run: FineTuneConfig, step: int) -> float:
    """Learning rate of a step, counted from 0 as in the released code."""
    return learning_rate(
        step,
        peak=_given(run.learning_rate),
        final=_given(run.final_learning_rate),
        warmup_steps=_given(run.warmup_steps),
        total_steps=_given(run.steps),
        schedule=_given(run.schedule),
    )


def describe(run: FineTuneConfig, model: VATTConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """What a continued run must share with the one that wrote the checkpoint."""
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in _FREE}
    settings |= {"model": dataclasses.asdict(model), "classes": list(classes)}
    if not run.from_scratch:  # as runs began before there was a choice
        del settings["from_scratch"]
    return json.loads(json.dumps(settings))


# -- what a fine-tuned model's folder says beside its config ---------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """How a classifier was trained, as far as its evaluation must know.

    Args:
        input: sizes by ``VATTConfig``'s names; a model may read another size than its tables'.
    """

    task: Task
    loss: Loss
    input: dict[str, Any]
    recipe: str

    def write(self, folder: Path) -> None:
        write_text(folder / RECORD, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """None where the folder has none, as of converted checkpoints. Raises ValueError."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, or write it anew") from error


def input_sizes(task: str, spec: ClipSpec) -> dict[str, Any]:
    """What a task reads of a file, under the names of ``ClipSpec``."""
    names = _SIZES[4:] if task == "audio" else _SIZES[:4]
    return {name: getattr(spec, name) for name in names}


def read_trained(folder: Path) -> set[str]:
    """Marks of the examples that a run was trained on; none of a converted checkpoint."""
    path = folder / TRAINED
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


def clip_spec(task: str, given: dict[str, Any], config: VATTConfig) -> ClipSpec:
    """What is read of a file: one modality, the other as small as can be."""
    other: dict[str, Any] = dict(samples=1) if MODALITY[task] == "video" else {}
    if not other:
        # windows begin on a grid of 0.04 s
        other = dict(frames=1, height=1, width=1, frames_per_second=25.0)
    values = dataclasses.asdict(ClipSpec.from_config(config)) | given | other
    return ClipSpec(**values | dict(words=1, texts_per_clip=1))
