"""A run, pre-training's or fine-tuning's: its folder, where it continues, its steps, its files.

What the two differ in is a ``Job``.
"""

import abc
import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from ..data.clips import Batch
from ..data.dataset import ClipDataset
from ..data.loader import loader
from ..files import check_folder
from ..weights import WEIGHTS
from .checkpoint import CHECKPOINT, Standing, keep_earlier, link_best, say_what_changed
from .distributed import Ranks, agreed, own_folder
from .loggers import make_loggers
from .metrics import METRICS, FiniteWatch, Mean, MetricsLog, NonFiniteError, Timer
from .run_page import REPORT
from .shards import ShardedSaves, folders, join_shards
from .stopping import StopRequests, kept_from_children, obey_the_parent_alone, stopped


class Trainer(Protocol):
    """What a framework brings to a run: a model, its optimizer, and their state on disk."""

    precision: str  # "bf16" or "fp32", what the products are computed in
    start_method: str | None  # of the loader's worker processes; None: Python's default
    pin_memory: bool  # batches are wanted in page-locked memory

    @property
    def shards(self) -> ShardedSaves | None:
        """Writes checkpoints instead of ``save``, and reads what it wrote."""

    def restore(self, path: Path, step: int) -> None:
        """Continue from a checkpoint of so many steps."""

    def save(self, path: Path, model: Any, standing: Standing) -> None:
        """Write a checkpoint of ``model()`` and the optimizer; all ranks call, the first writes."""

    def model(self) -> Any:
        """As it stands; all ranks call."""


class Step(NamedTuple):
    """What a step found; arrays of one value, which may still be on their way."""

    loss: Any
    gradient_norm: Any  # of all gradients together, of the whole batch, before anything clips it
    more: Callable[[], dict[str, float]]  # the rest, asked for at steps that are logged


class Job(abc.ABC):
    """What is trained on what, and what is told of it."""

    name: str  # shown before the progress bar
    run: Any  # PretrainConfig or FineTuneConfig
    trainer: Trainer
    dataset: ClipDataset
    files: Sequence[str]  # of the model's folder, which best/ has too

    @abc.abstractmethod
    def teaches(self, batch: Batch) -> bool:
        """Whether there is something to learn from in this rank's part of a batch."""

    @abc.abstractmethod
    def unteachable(self, steps: int) -> str | None:
        """What is wrong where no batch of the first ``steps`` teaches; None: one still may."""

    @abc.abstractmethod
    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""

    @abc.abstractmethod
    def step(self, batch: Batch, step: int, rate: float) -> Step:
        """One update; all ranks call."""

    @abc.abstractmethod
    def shown(self, values: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows of a logged step's values."""

    @abc.abstractmethod
    def measure(self, model: Any, ranks: Ranks) -> tuple[dict[str, float], float | None]:
        """Values of held-out media, and the one that best/ is the highest by; all ranks call."""

    @abc.abstractmethod
    def write_model(self, model: Any, out: Path) -> None:
        """The model's files; the first rank calls."""

    @abc.abstractmethod
    def write_report(self) -> None:
        """After a checkpoint; the first rank calls."""


# -- before the steps ------------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(out: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """The output folder, which nobody else writes within; all ranks call.

    Yields:
        makes the folder if it is new, once nothing can be refused any more.

    Raises:
        ValueError: it cannot be a folder, another process writes to it, or it holds a model that is
            no run's to continue.
    """
    with contextlib.ExitStack() as stack:
        owned = False
        with ranks.together():
            if ranks.first:
                check_folder(out)
                _check_no_model(out)
                if out.is_dir():
                    owned = stack.enter_context(own_folder(out, ranks))

        def make() -> None:
            with ranks.together():
                if ranks.first and not owned:
                    out.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(own_folder(out, ranks))

        yield make


def _check_no_model(out: Path) -> None:
    """Raise ValueError where a run's first save would replace a model.

    A run killed in its first save has logged, and left a model but neither checkpoint nor report.
    """
    begins = (out / METRICS).exists() and not (out / REPORT).exists()
    continues = begins or (out / CHECKPOINT).exists() or folders(out)
    if (out / WEIGHTS).exists() and not continues:
        raise ValueError(
            f"{out} holds a model already, and no checkpoint of a run to continue; name another "
            "folder"
        )


def warn_of_warmup(run: Any) -> None:
    """Warn where the warm-up is all of the run."""
    if run.warmup_steps and run.warmup_steps >= run.steps:
        warnings.warn(
            f"warmup_steps {run.warmup_steps} >= steps {run.steps}: "
            f"the learning rate never reaches {run.learning_rate:g}",
            stacklevel=4,
        )


def continued(
    path: Path,
    was: Standing | None,
    now: Standing,
    trainer: Trainer,
    ranks: Ranks,
    keep_last: int = 1,
) -> Standing:
    """Where the run goes on; the trainer stands there too. All ranks call.

    Args:
        path: of a file, or of shards.
        was: what the checkpoint at ``path`` says; None: there is none.
        now: a run at its beginning.
    """
    if was is None:
        return now
    assert now.data is not None and now.arithmetic is not None
    if ranks.first:
        say_what_changed(path, was, now.data, now.arithmetic)
    if trainer.shards is None and path.is_dir():  # it reads the one file
        _join(path.parent, keep_last, ranks)
        path = path.parent / CHECKPOINT
    with ranks.together():
        trainer.restore(path, was.step)
    return now._replace(step=was.step, best_loss=was.best_loss, best_score=was.best_score)


def _join(out: Path, keep_last: int, ranks: Ranks) -> None:
    """One file of what lies in shards, by rank 0."""
    with ranks.together():
        if ranks.first:
            join_shards(out, keep_last)


# -- the steps -------------------------------------------------------------------------------------


def train(job: Job, ranks: Ranks, standing: Standing, progress: bool) -> None:
    """The steps from ``standing`` on, and all that is written meanwhile; all ranks call.

    Raises:
        KeyboardInterrupt: asked to stop; the steps done are saved.
        NonFiniteError: a loss or gradient is nan or infinite.
        ValueError, OSError: media that teach nothing, or a file that could not be written.
    """
    _Steps(job, ranks, standing, progress).run_all()
    if job.trainer.shards is not None:
        _join(Path(job.run.out), job.run.keep_last, ranks)
    skipped: dict[str, str] = {}
    for one in ranks.all(dict(job.dataset.skipped)):
        skipped |= one
    if skipped and ranks.first:
        reasons = "\n  ".join(list(skipped.values())[:5])
        count = len(skipped)
        print(f"{count} media files could not be read, others stood in for them:\n  {reasons}")


class _Steps:
    def __init__(self, job: Job, ranks: Ranks, standing: Standing, progress: bool):
        self.job, self.run, self.ranks, self.standing = job, job.run, ranks, standing
        self.out = Path(job.run.out)
        self.start = self.saved = standing.step
        self.watch, self.losses = FiniteWatch(), Mean()
        self.stop = StopRequests(ranks.world > 1)
        self.progress = progress
        self.taught = self.new_best = False

    def run_all(self) -> None:
        job, run, ranks = self.job, self.run, self.ranks
        shown = None if self.progress else True  # None: on a terminal
        self.bar = tqdm(
            total=run.steps, initial=self.start, desc=job.name, unit="step", disable=shown
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.bar)
            with ranks.together():
                if ranks.first:
                    loggers = make_loggers(run.loggers, self.out, self.start, self.standing.run)
                    log = MetricsLog(self.out, self.start, loggers)
                    self.log = stack.enter_context(contextlib.closing(log))
            stack.enter_context(self.stop)
            if (shards := job.trainer.shards) is not None:
                shards.complete = self.start
                stack.enter_context(shards)
            loaded = loader(
                job.dataset,
                self.start,
                run.steps,
                run.workers,
                pin_memory=job.trainer.pin_memory,
                start_method=job.trainer.start_method,
                worker_init=obey_the_parent_alone,
            )
            stack.callback(loaded.close)
            with ranks.together(), kept_from_children():
                batches = iter(loaded)
            self.timer = Timer(lambda: loaded.waited_seconds)
            for done in range(self.start + 1, run.steps + 1):
                self._step(self._next(batches, done), done)

    def _next(self, batches: Iterator[Batch], done: int) -> Batch:
        """The batch of a step. Ranks stop at one step, and fail together."""
        batch, error = None, None
        try:
            if self.job.trainer.shards is not None:
                self.job.trainer.shards.check()
            with self.stop.waiting():
                batch = next(batches)
        except KeyboardInterrupt:
            pass
        except (ValueError, OSError) as met:
            error = met
        stopping, failed, self.taught = self.ranks.any(
            batch is None and error is None,
            error is not None,
            self.taught or (batch is not None and self.job.teaches(batch)),
        )
        if failed:
            self.ranks.fail(error)
        if stopping:
            if done - 1 > self.saved:
                self._save(done - 1)
            raise agreed(stopped(done - 1), self.ranks)
        assert batch is not None
        if not self.taught and (told := self.job.unteachable(done - self.start)):
            raise agreed(ValueError(told), self.ranks)
        return batch

    def _step(self, batch: Batch, done: int) -> None:
        run, last = self.run, done == self.run.steps
        rate = self.job.rate(done - 1)
        with self.ranks.answering():
            found = self.job.step(batch, done - 1, rate)
        try:
            looked_at = {"loss": found.loss, "gradient norm": found.gradient_norm}
            self.watch.add(done, batch.files, looked_at)
            self.losses.add(found.loss)
            self.timer.step(run.batch_size)
            self.bar.update()
            values: dict[str, float] = {}
            if done % run.log_every == 0 or last:
                values = self._values(found, rate)
                self.bar.set_postfix(self.job.shown(values))
            if run.eval_every is not None and (done % run.eval_every == 0 or last):
                values |= self._measured()
            if values and self.ranks.first:
                self.log.write(done, values)
            if done % run.checkpoint_every == 0 or last or self.new_best:
                self._save(done)
        except NonFiniteError as error:
            path = self.out / CHECKPOINT
            intact = f"{path} of step {self.saved} stays" if self.saved else "nothing is saved"
            told = NonFiniteError(
                f"{error}; {intact}: lower the learning rate, or look at these files"
            )
            self.ranks.fail(told)

    def _values(self, found: Step, rate: float) -> dict[str, float]:
        self.watch.check()
        return {
            "loss": float(found.loss),
            "learning_rate": rate,
            "gradient_norm": float(found.gradient_norm),
            **found.more(),
            "skipped_files": self.ranks.total(len(self.job.dataset.skipped)),
            **self.timer.take(self.ranks.largest),
        }

    def _measured(self) -> dict[str, float]:
        self.watch.check()
        values, score = self.job.measure(self.job.trainer.model(), self.ranks)
        best = self.standing.best_score
        self.new_best = score is not None and (best is None or score > best)
        if self.new_best:
            self.standing = self.standing._replace(best_score=score)
        self.timer.reset()
        return values

    def _save(self, done: int) -> None:
        self.watch.check()
        loss = self.losses.take()
        best = self.standing.best_loss
        lower = best is None or loss < best
        self.standing = self.standing._replace(step=done, best_loss=loss if lower else best)
        try:
            is_best, self.new_best = lower if self.run.best_by == "loss" else self.new_best, False
            save(self.job, self.standing, is_best, self.ranks)
            self.saved = done
            with self.ranks.together():
                if self.ranks.first:
                    self.job.write_report()
        except OSError as error:
            if self.job.trainer.shards is not None:  # it has told what is intact
                raise
            step = self.saved
            intact = f"the checkpoint of step {step} is intact" if step else "no checkpoint yet"
            told = OSError(
                f"{error}; {intact}: make room, and the same command continues from there"
            )
            raise (agreed(told, self.ranks) if hasattr(error, "agreed") else told) from error
        if self.progress and self.bar.disable:  # a log file has no bar
            how = "saved" if self.job.trainer.shards is None else "being saved"
            print(f"step {done} of {self.run.steps} {how}, mean loss {loss:.4g}", flush=True)


def save(job: Job, standing: Standing, best: bool, ranks: Ranks) -> None:
    """The model's files first, the checkpoint last; all ranks call.

    Whoever continues after a kill in between comes by here again.
    """
    if job.trainer.shards is not None:
        job.trainer.shards.begin(standing, best)
        return
    out, model = Path(job.run.out), job.trainer.model()
    with ranks.together():
        if ranks.first:
            job.write_model(model, out)
            if best:
                link_best(out, job.files)
            keep_earlier(out / CHECKPOINT, job.run.keep_last)
    with ranks.together():
        job.trainer.save(out / CHECKPOINT, model, standing)
