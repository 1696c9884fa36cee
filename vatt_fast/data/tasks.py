"""Work in pieces that stay where it is stopped, by processes that end with their parent."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")


def do_all(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    workers: int,
    *,
    is_done: Callable[[Task], bool],
    name: Callable[[Task], str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``work(task)`` for each task that is not done yet.

    Args:
        workers: processes; up to 1: this one works.
        name: what a task reads, for the message where a process dies.
        progress: told how many tasks are done, and of how many.

    Raises:
        ValueError: a process died. Whatever ``work`` raises; then no other task is begun.
    """
    waiting = [task for task in tasks if not is_done(task)]
    done = len(tasks) - len(waiting)

    def tell() -> None:
        if progress is not None:
            progress(done, len(tasks))

    tell()
    if workers <= 1 or len(waiting) <= 1:
        for task in waiting:
            work(task)
            done += 1
            tell()
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(waiting)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_live_with_the_parent,
    )
    with pool:
        try:
            running = [pool.submit(work, task) for task in waiting]
            for future in concurrent.futures.as_completed(running):
                future.result()
                done += 1
                tell()
        except BrokenProcessPool as error:
            left = [name(task) for task in waiting if not is_done(task)]
            raise ValueError(
                f"a process died while it read one of {', '.join(left[:workers])}; with "
                "--workers 0 the message says which"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _live_with_the_parent() -> None:
    """For a worker: only its parent stops it, and it ends when its parent is killed.

    It would wait for work for ever, and hold the lock of the folder, which it was born with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
