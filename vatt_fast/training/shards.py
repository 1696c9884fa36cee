"""Checkpoints in shards: each rank writes its own part while training goes on (strategy fsdp2).

A checkpoint is a folder in the run's, such as shards_00000040: a safetensors file of each rank, as
torch.distributed.checkpoint lays them out, and standing.json, which names them. It is whole or
absent: rank 0 gives it its name once the files of all ranks are on disk. Any number of ranks reads
it, each its part.
``join_shards`` makes the one file of it, from what lies on disk: no rank gathers the model.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ..files import part_of, place, remove, write_text
from ..model import VATT
from ..weights import CONFIG, SHARDS, VOCABULARY, WEIGHTS, save_description, save_tensors
from .checkpoint import (
    CHECKPOINT,
    MODEL,
    OPTIMIZER,
    STANDING,
    Standing,
    keep_earlier,
    link_best,
    model_weights,
    named_state,
    read_noted,
    read_standing,
    whole,
)
from .distributed import Ranks

# in standing.json: the step whose model is the best so far, if that lies in shards; bytes of files
_BEST, _FILES = "best", "files"


def folders(out: Path) -> list[Path]:
    """A run's checkpoints in shards, oldest first."""
    return sorted(out.glob(f"{SHARDS}????????"))


def newest(out: Path) -> Path:
    """Where a run is continued from: its one file, if there is one, or the shards of a later step.

    Raises ValueError: it is damaged.
    """
    found = [path for path in (out / CHECKPOINT, *folders(out)[-1:]) if path.exists()]
    return max(found, key=lambda path: read_standing(path).step, default=out / CHECKPOINT)


class ShardedSaves:
    """Writes a run's checkpoints in shards, one at a time. All ranks make and call it alike.

    Within it, an error that all ranks have raised, and the end, wait for what is being written.

    Attributes:
        complete: steps of the last checkpoint that is known to be on disk; 0: none.
    """

    def __init__(
        self,
        out: Path,
        keep_last: int,
        model: VATT,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
    ):
        self.complete = 0
        self._out, self._keep_last, self._ranks = out, keep_last, ranks
        self._model, self._optimizer = model, optimizer
        # the writing threads exchange what they plan beside what the ranks exchange meanwhile
        self._group = dist.new_group(backend="gloo", timeout=ranks.patience)
        self._thread = ThreadPoolExecutor(1, "shards")
        self._pending: Future[int] | None = None
        self._best: int | None = None
        self._options = _staging() if torch.cuda.is_available() else {}

    def __enter__(self) -> "ShardedSaves":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not getattr(error, "agreed", False):
            return  # the others may be elsewhere
        try:
            self.finish()
        except OSError as failed:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise
            warnings.warn(str(failed), stacklevel=2)
        self._thread.shutdown()
        dist.destroy_process_group(self._group)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint in shards. Raises ValueError: it is damaged."""
        load_shards(path, self._model, self._optimizer)
        self._best = read_noted(path).get(_BEST)

    def begin(self, standing: Standing, best: bool) -> None:
        """Begin to write a checkpoint, once the last one is on disk; training may go on.

        Args:
            best: this model is the best so far.

        Raises:
            OSError: the last one could not be written, or the folder of this one.
        """
        from torch.distributed import checkpoint

        self.finish()
        if best:
            self._best = standing.step
        folder = self._out / f"{SHARDS}{standing.step:08d}"
        part = part_of(folder)
        with self._ranks.together():
            if self._ranks.first:
                save_description(self._model, self._out)
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
        # torch 2.13 does not copy a DTensor without dimensions before it returns
        state = {
            name: value if value.ndim else whole(value).clone()
            for name, value in named_state(self._model, self._optimizer).items()
        }
        written: Any = checkpoint.async_save(
            state,
            storage_writer=checkpoint.HuggingFaceStorageWriter(str(part), save_distributed=True),
            process_group=self._group,
            **self._options,
        )
        self._pending = self._thread.submit(self._complete, written, folder, standing)

    def check(self) -> None:
        """Raise OSError where this rank knows by now that what was begun could not be written."""
        if self._pending is not None and self._pending.done():
            self._result()

    def finish(self) -> None:
        """Wait until what was begun is on disk; all ranks call. Raises OSError on all if not."""
        with self._ranks.together():
            self._result()

    def _result(self) -> None:
        from torch.distributed.checkpoint import CheckpointException

        if (pending := self._pending) is None:
            return
        self._pending = None
        try:
            with self._ranks.answering():
                self.complete = pending.result()
        except CheckpointException as error:
            raise OSError(self._told(_reason(error))) from error
        except ConnectionError:
            raise
        except OSError as error:
            raise OSError(self._told(str(error))) from error

    def _told(self, reason: str) -> str:
        intact = f"the checkpoint of step {self.complete} is intact"
        return (
            f"a checkpoint could not be written: {reason}; "
            f"{intact if self.complete else 'no checkpoint yet'}: make room, and the same command "
            "continues from there"
        )

    def _complete(self, written: Future, folder: Path, standing: Standing) -> int:
        """What a thread does: wait until all ranks have written, and give the folder its name."""
        try:
            written.result()
            if self._ranks.first:
                noted = {_BEST: self._best, _FILES: _files(part_of(folder))}
                write_text(part_of(folder) / STANDING, json.dumps(standing.metadata() | noted))
                place(folder)
                kept = folders(self._out)[-self._keep_last :]
                for each in folders(self._out):
                    if each not in kept and _step(each) != self._best:
                        remove(each)
        finally:
            if self._ranks.first:
                shutil.rmtree(part_of(folder), ignore_errors=True)
        return standing.step


def _staging() -> dict[str, Any]:
    """Shards go to the host over pinned memory that is kept, before ``async_save`` returns."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return {"async_stager": DefaultStager(StagingOptions(True, False, False, True))}


def _reason(error: Any) -> str:
    """What ranks met, of a CheckpointException."""
    return "; ".join(f"rank {rank}: {met[0]}" for rank, met in error.failures.items())


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(SHARDS))


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


# -- reading ---------------------------------------------------------------------------------------


def load_shards(path: Path, model: VATT, optimizer: torch.optim.Optimizer) -> None:
    """Restore a sharded model and its optimizer, each rank its part of all ranks' files.

    Raises ValueError for a damaged checkpoint.
    """

    def places(sizes: dict[str, torch.Size]) -> dict[str, Tensor]:
        tensors = {MODEL + name: value for name, value in model.state_dict().items()}
        parameters = dict(model.named_parameters())
        for name, size in sizes.items():
            if name.startswith(OPTIMIZER):
                key, _, weight = name.removeprefix(OPTIMIZER).partition("/")
                owner = parameters[weight]
                if key == "step":
                    tensors[name] = torch.zeros(size, device=owner.device)
                else:
                    tensors[name] = torch.zeros_like(owner.detach())
                optimizer.state[owner][key] = tensors[name]
        return tensors

    _read(path, places)


def read_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in shards, whole. Raises ValueError: it is damaged."""
    return _read(path, lambda sizes: {name: torch.empty(size) for name, size in sizes.items()})


def _read(
    path: Path, places: Callable[[dict[str, torch.Size]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read tensors of known names and sizes into those that ``places`` makes for them."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import CheckpointException

    try:
        there = _files(path)
        for name, size in read_noted(path)[_FILES].items():
            if there.get(name) != size:
                raise ValueError(f"{name} had {size} bytes, and now {there.get(name, 'is gone')}")
        reader = checkpoint.HuggingFaceStorageReader(str(path))
        found: dict[str, Any] = {**reader.read_metadata().state_dict_metadata}
        tensors = places({name: each.size for name, each in found.items()})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
        reason = _reason(error) if isinstance(error, CheckpointException) else error
        raise ValueError(
            f"{path} is not a whole checkpoint ({reason}); delete the folder, and the one before "
            "it is taken"
        ) from error
    return tensors


def join_shards(out: Path, keep_last: int | None = None) -> int | None:
    """Make of a run's shards the files that a run on one device has, and remove the shards.

    Killed in between, it can be called again.

    Args:
        keep_last: as ``PretrainConfig.keep_last``; None: all that are there.

    Returns:
        Steps of the newest checkpoint; None: nothing lies in shards.

    Raises:
        ValueError: shards are damaged. OSError: a file could not be written. The shards stay.
    """
    found = folders(out)
    keep_last = keep_last or len(found)
    if not found:
        return None
    best = read_noted(found[-1]).get(_BEST)
    for folder in found:
        standing, path = read_standing(folder), out / CHECKPOINT
        there = read_standing(path).step if path.exists() else 0
        if folder not in found[-keep_last:] and standing.step != best:
            continue
        tensors = read_shards(folder)
        save_tensors(model_weights(tensors), out / WEIGHTS)
        if standing.step == best:
            link_best(out, (WEIGHTS, CONFIG, VOCABULARY))
        if folder in found[-keep_last:] and standing.step > there:
            keep_earlier(path, keep_last)
            save_tensors(tensors, path, metadata=standing.metadata())
    for folder in found:
        remove(folder)
    return standing.step
