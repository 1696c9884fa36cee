"""The processes that share a run: torchrun's ranks, and what they agree on beside the mathematics.

Ranks stop at one step, fail together, and say who is silent. That goes over gloo on the host, also
where GPUs exchange over NCCL or JAX runs the devices: nothing here waits for a device.
"""

import contextlib
import dataclasses
import datetime
import gc
import hashlib
import itertools
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..devices import pick_device
from ..files import only_writer, remove_litter
from .metrics import NonFiniteError

_WAIT_FOR_WORKERS = (0.5, 1, 2, 4, 0)  # seconds

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REPLICA_GROUPS = ("TORCHFT_LIGHTHOUSE", "NUM_REPLICA_GROUPS", "REPLICA_GROUP_ID")
# ranks may differ in these: what a host calls its files, and how fast it reads them
_OWN = (
    "data",
    "media",
    "out",
    "cache",
    "eval_data",
    "init",
    "words",
    "device",
    "workers",
    "process",
)
_ANSWER_SECONDS = 3.0


class Ranks:
    """This process's place among those that share a run; alone without torchrun.

    Attributes:
        rank, world: place, from 0, and number.
        device: what ``PretrainConfig.device`` is for this rank.
        patience: how long one waits for the others; None: as the process group has it.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, device: str = "auto", store: Any = None, wait: int = 0
    ):
        self.rank, self.world, self.device = rank, world, device
        self._store, self._wait = store, wait
        self.patience = datetime.timedelta(seconds=wait) if wait else None
        self._places: list[str] = []  # of all ranks: host and process id

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Whether some rank says so, of each flag."""
        if self.world == 1:
            return list(flags)
        with self.answering():
            told = torch.tensor(flags, dtype=torch.int32, device=self._place())
            dist.all_reduce(told, dist.ReduceOp.MAX)
            return told.bool().tolist()

    def largest(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's largest on any rank."""
        found = self._reduced(list(values.values()), dist.ReduceOp.MAX)
        return dict(zip(values, found, strict=True))

    def total(self, count: int) -> int:
        """The sum over ranks."""
        return int(self._reduced([count], dist.ReduceOp.SUM)[0])

    def _reduced(self, values: list[float], how: Any) -> list[float]:
        if self.world == 1:
            return values
        with self.answering():
            found = torch.tensor(values, dtype=torch.float64, device=self._place())
            dist.all_reduce(found, how)
            return found.tolist()

    def all(self, value: Any) -> list[Any]:
        """Every rank's ``value``, which pickle takes, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.answering():
            dist.all_gather_object(found, value)
        return found

    def firsts(self, value: Any) -> Any:
        """Rank 0's ``value``, on all."""
        return self.all(value if self.first else None)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done within fails on all ranks or on none. All must come by."""
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError, ArithmeticError) as met:
            error = met
        (failed,) = self.any(error is not None)
        if failed:
            self.fail(error)

    def fail(self, error: Exception | None) -> None:
        """Raise on all ranks what one or more of them met; all must call.

        Raises:
            ValueError, OSError or NonFiniteError: of the first rank that met one.
        """
        if self.world == 1:
            assert error is not None
            raise error
        kind: type[Exception] = ValueError
        for each in (OSError, NonFiniteError):
            if isinstance(error, each):
                kind = each
        met = self.all(None if error is None else (kind, str(error)))
        told: dict[str, int] = {}
        for number, each in enumerate(met):
            if each is not None:
                told.setdefault(each[1], number)
        kind = next(each[0] for each in met if each is not None)
        everywhere = len(told) == 1 and all(met)
        text = "; ".join(
            message if everywhere else f"rank {number}: {message}"
            for message, number in list(told.items())[:8]
        )
        raise agreed(kind(text), self) from error

    def require_alike(self, told: Mapping[str, Any]) -> None:
        """Raise ValueError on all ranks where one has other settings, data, versions than rank 0.

        Args:
            told: by name, what ``json`` takes; dicts within are compared by their names.
        """
        flat = _flat(told)
        digest = hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()
        where = f"{socket.gethostname()}, process {os.getpid()}"
        found = self.all((digest, where))
        self._places = [place for _, place in found]
        if len({digest for digest, _ in found}) == 1:
            return
        every, lines = self.all(flat), []
        for number, theirs in enumerate(every):
            names = [n for n in {**every[0], **theirs} if theirs.get(n) != every[0].get(n)]
            lines += [
                f"rank {number} ({self._places[number]}) has {name} {theirs.get(name)!r}, rank 0 "
                f"{every[0].get(name)!r}"
                for name in names[:3]
            ]
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise agreed(
            ValueError(
                f"the ranks differ: {'; '.join(lines[:4])}{more}; start all with the same command, "
                "package and files"
            ),
            self,
        )

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """An exchange within that fails says which ranks are gone or silent. Raises OSError."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _of_a_group(error):
                raise
            seconds = time.monotonic() - began
            raise ConnectionError(
                f"{self._silent(error, seconds)}; the last checkpoint stays: the same command "
                "continues from there"
            ) from error

    def _silent(self, error: Exception, seconds: float) -> str:
        how = str(error).splitlines()[0]
        if self._store is None:
            return f"an exchange between ranks failed ({how})"
        try:
            self._store.set(f"here/{self.rank}", "1")
            deadline = time.monotonic() + _ANSWER_SECONDS
            silent = [*range(self.world)]
            while silent and time.monotonic() < deadline:
                time.sleep(0.1)
                silent = [r for r in silent if not self._store.check([f"here/{r}"])]
        except RuntimeError:  # rank 0 held the store
            silent = [0]
        if not silent:
            return f"an exchange between ranks failed ({how})"
        places = dict(enumerate(self._places))
        names = ", ".join(f"rank {r} ({places.get(r, 'before its start')})" for r in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        if seconds >= self._wait > 0:
            return f"{names}{more} did not answer for {self._wait} s"
        return f"{names}{more} ended or broke off"

    def _place(self) -> torch.device:
        """Where the group exchanges small numbers: on the host if it can."""
        if "cpu" in str(dist.get_backend_config()):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def _of_a_group(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def agreed(error: Any, ranks: Ranks) -> Any:
    """Mark an error that all ranks raise at one point: the group can end, rank 0 speaks for all."""
    error.agreed, error.told_by_another = True, not ranks.first
    return error


def is_launched() -> bool:
    """Whether torchrun, or what sets its variables, started this process."""
    return all(os.environ.get(name) for name in _TORCHRUN)


def speaks() -> bool:
    """Whether this process speaks for all that the launcher started."""
    return not is_launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(device: str, patience: int, framework: str = "torch") -> Iterator[Ranks]:
    """The ranks that torchrun's variables tell of; leaves the process group in order at the end.

    A process group that is there already is used, and stays.

    Args:
        device: as ``PretrainConfig`` has it; "auto" and "cuda" give each rank its own.
        patience: seconds that a rank waits for the others.

    Raises:
        ValueError: replica groups of TorchFT; fewer GPUs than local ranks.
        OSError: ranks did not come.
    """
    _refuse_replica_groups()
    given = dist.is_available() and dist.is_initialized()
    launched = is_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if not given and not launched:
        yield Ranks(device=device)
        return
    if given:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        with ranks.together():
            ranks.device = _device_of(device, framework)
        yield ranks
        return
    device = _device_of(device, framework)
    # its functions have the group as a default argument if they are defined while there is one
    import torch.distributed.nn.functional  # noqa: F401

    gpus = framework == "torch" and pick_device(device).type == "cuda"
    wait = datetime.timedelta(seconds=patience)
    try:
        store = _meeting(wait)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=world,
            timeout=wait,
        )
    except RuntimeError as error:
        if not _of_a_group(error):
            raise
        raise ConnectionError(
            f"the {os.environ['WORLD_SIZE']} ranks did not find each other within {patience} s "
            f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from error
    ranks = Ranks(rank, world, device, dist.PrefixStore("silent", store), patience)
    try:
        yield ranks
    except BaseException as error:
        if getattr(error, "agreed", False):
            _end_group()
        raise  # else others may still wait in the group, and its end for them
    _end_group()


def _meeting(wait: datetime.timedelta) -> Any:
    """A store of this run's own, at the address of torchrun's variables.

    What is below stays until the process ends: where a rank came to its next run before the first
    rank had closed the store of the last one, it would join that.
    """
    where = tuple(os.environ[name] for name in _TORCHRUN)
    if where not in _meetings:
        _meetings[where] = next(dist.rendezvous("env://", timeout=wait))[0], itertools.count()
    whole, runs = _meetings[where]
    # torchrun's store outlives the ranks that it starts again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"vatt_fast/{attempt}/{next(runs)}", whole)


_meetings: dict[tuple[str, ...], tuple[Any, Iterator[int]]] = {}  # a store, and runs from 0


def leave(status: int) -> None:
    """End a process that torchrun started at once, with this status; others go on.

    Threads of a group that something still holds, as torch's caches of DTensors do, or that an
    error left as it was, would abort the interpreter at its end.
    """
    if is_launched() and "torch.distributed.distributed_c10d" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_group() -> None:
    dist.barrier()
    gc.collect()  # DistributedDataParallel holds the group, and lies in cycles
    dist.destroy_process_group()


def check_settings(ranks: Ranks, run: Any) -> None:
    """Raise ValueError, before anything is read, where ranks cannot share a run.

    They have other settings or versions, or a batch that they cannot divide.

    Args:
        run: settings of a pre-training or a fine-tuning.
    """
    settings = {n: v for n, v in dataclasses.asdict(run).items() if n not in _OWN}
    versions = {"vatt_fast": __version__, "torch": torch.__version__, "python": _python()}
    ranks.require_alike(versions | settings)
    if run.batch_size % ranks.world:
        raise agreed(
            ValueError(
                f"batch_size is {run.batch_size}, the clips of a step on all ranks; {ranks.world} "
                "ranks cannot share it evenly: take a multiple"
            ),
            ranks,
        )


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _refuse_replica_groups() -> None:
    found = [name for name in _REPLICA_GROUPS if os.environ.get(name)]
    if found and os.environ.get("NUM_REPLICA_GROUPS") != "1":
        raise ValueError(
            f"{found[0]} is set: TorchFT's replica groups exchange gradients alone, so negatives "
            "and batch statistics would be those of one group; unset it, and let torchrun restart "
            "(--max-restarts)"
        )


def _device_of(device: str, framework: str) -> str:
    """The device of this rank: GPUs are given out by local rank. Raises ValueError: none such."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if framework == "jax" or device not in ("auto", "cuda"):
        if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"device is {device!r} for all ranks of this host; use 'cuda' or 'auto': each "
                "takes its own"
            )
        if framework == "torch":
            pick_device(device)
        return device
    if pick_device(device).type != "cuda":
        return "cpu"
    if local >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"local rank {local} has no GPU: this host has {count}; start {count} ranks on it "
            "(--nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _flat(told: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in told.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


@contextlib.contextmanager
def own_folder(out: Path, ranks: Ranks) -> Iterator[bool]:
    """The run folder for this process alone, without what a killed one left there; True."""
    with contextlib.ExitStack() as stack:
        for seconds in _WAIT_FOR_WORKERS if ranks.world > 1 else (0,):
            try:
                stack.enter_context(only_writer(out))
                break
            except ValueError:
                # workers of a rank that was killed are still at a clip
                if seconds == _WAIT_FOR_WORKERS[-1] or ranks.world == 1:
                    raise
                time.sleep(seconds)
        remove_litter(out)
        yield True
