"""Requests to stop a run: SIGINT, SIGTERM and SIGUSR1, to the process or to its whole group."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

# SIGTERM is sent by SLURM, systemd and timeout; SIGUSR1 by `sbatch --signal`
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Within, the signals only set ``requested``, so that a run ends between two steps.

    A second signal acts at once. Outside the main thread nothing is caught.

    Args:
        patient: a second signal changes nothing: a launcher passes on what came here already.
    """

    def __init__(self, patient: bool = False):
        self.requested = False
        self._patient = patient
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for each in SIGNALS:
                self._before[each] = signal.signal(each, self._request)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame) -> None:
        self.requested = True
        if not self._patient:
            signal.signal(number, self._before[number])
        if self._waiting:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, a request raises KeyboardInterrupt: nothing is under way that must be ended."""
        self._waiting = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started within never see the signals: the main process decides for them.

    A signal to a whole group would else kill the workers of a loader, and with them the batch that
    the main process waits for.
    """
    resource_tracker.ensure_running()  # its start unblocks SIGINT and SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_the_parent_alone(worker: int) -> None:
    """For a child that was started within ``kept_from_children``: SIGTERM from its parent ends it.

    The loader ends workers that do not end by themselves so; the same signal from anybody else is
    for the main process.
    """
    parent = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(1)

    threading.Thread(target=listen, daemon=True, name="signals").start()


def stopped(done: int) -> KeyboardInterrupt:
    """What a run raises that was asked to stop, and has saved that step."""
    return KeyboardInterrupt(f"stopped after step {done}; the same command continues from there")
