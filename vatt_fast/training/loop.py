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
from typing import Any

from tqdm import tqdm

from ..config import VATTConfig, preset
from ..data.clips import ClipSpec, DropToken
from ..data.dataset import ClipDataset, folder_captions
from ..data.loader import loader
from ..data.text import PADDING, UNKNOWN, Vocabulary, split_words
from ..devices import has_a_tpu, without_a_tpu
from ..losses import VATTLoss
from ..model import VATT
from ..weights import save_model
from .settings import PretrainConfig, describe, rate_of
from .step import TorchTrainer, Trainer

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"


def pretrain(
    run: PretrainConfig, *, model_config: VATTConfig | None = None, progress: bool = True
) -> VATT:
    """Run or continue a pre-training; returns the trained model.

    Writes a checkpoint every ``checkpoint_every`` steps, at the end, and on SIGINT or SIGTERM (then
    raises KeyboardInterrupt). Called again with the same settings it continues there, with the same
    batches and the same DropToken draws as an uninterrupted run.

    Args:
        model_config: instead of ``run.preset`` and ``run.recipe``; vocab_size is replaced by the
            captions' vocabulary.

    Raises:
        ValueError: settings out of range, unreadable data, or an output folder of another run.
    """
    out = Path(run.out)
    if run.warmup_steps >= run.steps:
        warnings.warn(
            f"warmup_steps {run.warmup_steps} >= steps {run.steps}: "
            f"the learning rate never reaches {run.learning_rate:g}",
            stacklevel=2,
        )
    vocabulary = vocabulary_of(run.data, run.max_words)
    config = dataclasses.replace(
        model_config or preset(run.preset, run.recipe), vocab_size=len(vocabulary)
    )
    trainer = _trainer(run, config, vocabulary)
    dataset = ClipDataset(
        run.data,
        ClipSpec.from_config(config),
        vocabulary=vocabulary,
        batch_size=run.batch_size,
        seed=run.seed,
        shuffle_captions=run.shuffle_captions,
        cache_dir=run.cache,
        drop_token=DropToken(config, run.drop_rate, run.drop_per, trainer.devices),
    )
    identity = describe(run, config)
    start = trainer.restore(out / CHECKPOINT, identity) if (out / CHECKPOINT).exists() else 0
    out.mkdir(parents=True, exist_ok=True)
    logger = MetricsLog(out, start)

    options: dict[str, Any] = dict(pin_memory=trainer.pin_memory, start_method=trainer.start_method)
    batches = loader(dataset, start, run.steps, run.workers, **options)
    quiet = None if progress else True
    bar = tqdm(total=run.steps, initial=start, desc="pretrain", unit="step", disable=quiet)
    began, clips = time.perf_counter(), 0
    with contextlib.closing(logger), bar, stop_requests() as stopping:
        for step, batch in enumerate(batches, start):
            rate = rate_of(run, step)
            loss = trainer.step(batch, step, rate)
            clips += len(batch)
            bar.update()
            done = step + 1
            if done % run.log_every == 0 or done == run.steps:
                values = _values(loss, rate) | {
                    "temperature": trainer.temperature(),
                    "skipped_files": len(dataset.skipped),
                    "clips_per_second": clips / (time.perf_counter() - began),
                }
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
        count = len(dataset.skipped)
        print(f"{count} media files could not be read, others stood in for them:\n  {reasons}")
    return trainer.model().eval()


def _values(loss: VATTLoss, rate: float) -> dict[str, float]:
    parts = {"loss": loss.total, "loss_va": loss.va, "loss_vt": loss.vt}
    values = {name: float(value) for name, value in parts.items() if value is not None}
    return {"loss": values.pop("loss"), "learning_rate": rate, **values}


def _trainer(run: PretrainConfig, config: VATTConfig, vocabulary: Vocabulary) -> Trainer:
    if run.framework == "jax":
        if not has_a_tpu():
            # where libtpu is installed to compile with, JAX would look for a TPU, and say so at
            # length
            without_a_tpu(jax_on_cpu=False)
        try:
            from ..on_jax.training import JaxTrainer
        except ModuleNotFoundError as error:
            raise ValueError(
                f"framework 'jax' needs {error.name}: pip install 'vatt_fast[jax]'"
            ) from error
        return JaxTrainer(run, config, vocabulary)
    return TorchTrainer(run, config, vocabulary)


def vocabulary_of(folder: str | Path, max_words: int) -> Vocabulary:
    """The most frequent words of a folder's captions.

    Only padding and the unknown word where there are none.
    """
    sentences = [
        caption.text for entries in folder_captions(folder).values() for caption in entries
    ]
    return (
        Vocabulary.build(sentences, max_words)
        if any(map(split_words, sentences))
        else Vocabulary([PADDING, UNKNOWN])
    )


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM, so that a run can end between two steps.

    A second signal acts at once.
    """
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
    """metrics.jsonl (one line a logged step) and TensorBoard events.

    A continued run drops lines beyond its checkpoint.
    """

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS
        # a killed run may leave half a line
        text = path.read_text() if path.exists() else ""
        whole_lines = text.rpartition("\n")[0].splitlines()
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
