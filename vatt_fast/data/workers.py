"""Worker processes that read clips into memory they share with the process that wants batches.

The unit of work is a row. Tickets, one a row, lie in a pipe that every worker takes from; a ticket
is written once its part of the memory is free. What came of a row goes back through a pipe of the
worker's own. Nothing is locked, so a worker that is killed leaves nothing locked.
"""

import contextlib
import gc
import mmap
import multiprocessing
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch

from .clips import Shapes, arrays_in
from .media_file import DEADLINE_SECONDS

_TICKET = np.dtype("<i8")
_ROW_BITS = 32  # of a ticket; the others are the fill
# A file that keeps a worker for so long is given up with the run: its own deadlines have failed.
HANG_SECONDS = 10 * DEADLINE_SECONDS
_LOOK_SECONDS = 5.0  # how often, meanwhile, workers are looked at
_END_SECONDS = 5.0  # that a worker has for the clip it is at
_LARGEST_PIPE = 2**20  # bytes, that Linux gives everyone
_AHEAD = 4  # rows that a worker reads while its next one is fetched


class Fills(Protocol):
    """What workers read: memory that is filled row by row, for one batch or several."""

    def rows(self, fill: int) -> int: ...

    def shapes(self, fill: int) -> Shapes:
        """The arrays of a fill."""
        ...

    def begin(self, fill: int, arrays: dict[str, np.ndarray]) -> None:
        """Write what all rows share; in the process that wants batches."""
        ...

    def read_row(
        self, fill: int, row: int, arrays: dict[str, np.ndarray], reading: Callable[[int], None]
    ) -> Any:
        """In a worker. ``reading`` is told the number of each example before it is opened."""
        ...

    def read_ahead(self, fill: int, row: int) -> None:
        """Let the system fetch what a row will be read from."""
        ...

    def name(self, example: int) -> str: ...


class SharedMemory:
    """Zeroed memory that child processes share; nameless, so it is gone with the last of them."""

    def __init__(self, size: int):
        if hasattr(os, "memfd_create"):  # whatever the size of /dev/shm
            descriptor = os.memfd_create("vatt_fast")
        else:
            descriptor, name = tempfile.mkstemp()
            os.unlink(name)
        os.ftruncate(descriptor, size)
        self._hold(descriptor, size)

    def _hold(self, descriptor: int, size: int) -> None:
        self._descriptor, self.size = descriptor, size
        self.map = mmap.mmap(descriptor, size)

    def __del__(self) -> None:
        os.close(self._descriptor)  # the map stays while there are arrays in it

    def __reduce__(self) -> Any:  # for a child that is started anew
        return _attach, (reduction.DupFd(self._descriptor), self.size)


def _attach(descriptor: Any, size: int) -> SharedMemory:
    memory = SharedMemory.__new__(SharedMemory)
    memory._hold(descriptor.detach(), size)
    return memory


class Memory:
    """The places of two fills, or so many, and a note of what each worker reads."""

    def __init__(self, size: int, places: int, workers: int):
        page = mmap.PAGESIZE
        self.size = -(-size // page) * page
        self.places, self.workers = places, workers
        notes = -(-workers * 16 // page) * page
        self.shared = SharedMemory(places * self.size + notes)

    def arrays(self, fill: int, shapes: Shapes) -> dict[str, np.ndarray]:
        return arrays_in(self.shared.map, shapes, fill % self.places * self.size)

    @property
    def notes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each worker: the example that it reads or -1, and since when."""
        begin = self.places * self.size
        example = np.ndarray(self.workers, np.int64, self.shared.map, begin)
        return example, np.ndarray(
            self.workers, np.float64, self.shared.map, begin + example.nbytes
        )


class Workers:
    """Processes that read the rows of fills.

    Args:
        largest: rows of the largest fill.
        stop: the fill after the last one.
        start_method: multiprocessing's; None: Python's default.
        init: called first in each worker, with its number.
    """

    def __init__(
        self,
        fills: Fills,
        memory: Memory,
        count: int,
        largest: int,
        stop: int,
        start_method: str | None = None,
        init: Callable[[int], None] | None = None,
    ):
        context: Any = multiprocessing.get_context(start_method)
        self._fills = fills
        self._example, self._since = memory.notes
        self._example[:] = -1
        tickets, self._tickets = context.Pipe(duplex=False)
        in_flight = memory.places * largest
        _widen(self._tickets, in_flight * _TICKET.itemsize)
        self._processes: list[Any] = []
        self._results: list[Connection] = []
        self._selector = selectors.DefaultSelector()
        self._forked = forked = context.get_start_method() == "fork"
        if forked:
            # the collector writes into all it looks at, and so each process would get a copy of its
            # own of what they share
            gc.collect()
            gc.freeze()
        for number in range(count):
            reader, writer = context.Pipe(duplex=False)
            _widen(writer, in_flight * 64)
            self._results.append(reader)
            # a forked child has all that is open here; it must see when this process ends
            ours = [self._tickets, *self._results] if forked else []
            process = context.Process(
                target=_work,
                args=(number, fills, stop, memory, tickets, writer, ours, init),
                daemon=True,
                name=f"clips {number}",
            )
            process.start()
            writer.close()
            self._processes.append(process)
            self._selector.register(reader, selectors.EVENT_READ, number)
        tickets.close()

    def ask(self, fill: int) -> None:
        """Let the workers read a fill, whose memory is free."""
        numbers = np.arange(self._fills.rows(fill), dtype=_TICKET) + (fill << _ROW_BITS)
        waiting = memoryview(numbers.tobytes())
        with contextlib.suppress(BrokenPipeError):  # all are dead, as ``results`` will tell
            while waiting:
                waiting = waiting[os.write(self._tickets.fileno(), waiting) :]

    def results(self) -> Iterable[tuple[int, int, Any]]:
        """Wait for what came of some rows: fill, row, and what was returned or raised.

        Raises:
            ChildProcessError: a worker has died, or hangs.
        """
        found: list[tuple[int, Any]] = []
        while not found:
            ready = self._selector.select(_LOOK_SECONDS)
            for key, _ in ready:
                reader: Any = key.fileobj
                try:
                    while True:
                        found.append(reader.recv())
                        if not reader.poll():
                            break
                except (EOFError, ConnectionError):
                    self._raise_dead(key.data)
            if not ready:
                self._look_for_hanging()
        return [(*_fill_and_row(ticket), what) for ticket, what in found]

    def _reads(self, number: int) -> str:
        example = int(self._example[number])
        return "while it began or waited" if example < 0 else f"at {self._fills.name(example)}"

    def _raise_dead(self, number: int) -> None:
        process = self._processes[number]
        process.join(_END_SECONDS)
        code = process.exitcode
        how = f"ended with status {code}"
        remedy = "remove or replace that file"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                remedy = "if memory ran out, take fewer workers or smaller batches"
        raise ChildProcessError(
            f"worker {number} of {len(self._processes)} {how} {self._reads(number)}; {remedy}"
        )

    def _look_for_hanging(self) -> None:
        for number, (example, since) in enumerate(zip(self._example, self._since, strict=True)):
            if example >= 0 and time.monotonic() - since > HANG_SECONDS:
                raise ChildProcessError(
                    f"worker {number} of {len(self._processes)} has been for more than "
                    f"{HANG_SECONDS:g} s {self._reads(number)}; remove or replace that file"
                )

    def close(self) -> None:
        """End the workers. They finish the clip that they are at, if that is soon."""
        if self._forked:
            gc.unfreeze()
        self._tickets.close()
        for reader in self._results:
            reader.close()  # whoever would tell of a row ends
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.terminate()
                process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._selector.close()


def _fill_and_row(ticket: int) -> tuple[int, int]:
    return ticket >> _ROW_BITS, ticket & (1 << _ROW_BITS) - 1


def _widen(pipe: Connection, size: int) -> None:
    """Let a pipe hold so much that nobody waits for its reader; elsewhere they wait."""
    if sys.platform == "linux" and size > 2**16:
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, min(size, _LARGEST_PIPE))


def _work(
    number: int,
    fills: Fills,
    stop: int,
    memory: Memory,
    tickets: Connection,
    results: Connection,
    ours: list[Connection],
    init: Callable[[int], None] | None,
) -> None:
    for connection in ours:
        connection.close()
    if init is not None:
        init(number)
    torch.set_num_threads(1)  # there is a process a core
    examples, since = memory.notes

    def reading(example: int) -> None:
        since[number] = time.monotonic()
        examples[number] = example

    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):  # nobody wants it any more
        while ticket := os.read(tickets.fileno(), _TICKET.itemsize):
            (asked,) = np.frombuffer(ticket, _TICKET).tolist()
            fill, row = _fill_and_row(asked)
            try:
                arrays = memory.arrays(fill, fills.shapes(fill))
                read_ahead(fills, fill, row, stop, memory.workers)
                what: Any = fills.read_row(fill, row, arrays, reading)
            except Exception as error:  # it is raised where the batch is asked for
                what = _told(error)
            examples[number] = -1
            results.send((asked, what))


def read_ahead(fills: Fills, fill: int, row: int, stop: int, workers: int) -> None:
    """Have one of the rows fetched that come after this one, each of them once.

    Rows are taken in order. So a row is fetched while every worker reads some others.
    """
    rows = fills.rows(fill)
    row += min(_AHEAD * max(workers, 1), rows)
    if row >= rows:
        fill, row = fill + 1, row - rows
    if fill < stop and row < fills.rows(fill):
        fills.read_ahead(fill, row)


def _told(error: Exception) -> Exception:
    """An error that can be sent, and is still itself there."""
    if isinstance(error, ValueError | OSError):
        with contextlib.suppress(Exception):
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return error
    told = "".join(traceback.format_exception(error))
    return RuntimeError(f"a worker that reads clips failed:\n{told}")
