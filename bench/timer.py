"""Clocks, the interleaved comparison they serve, and peak memory.

Contenders run in one process on the same inputs in rotating order, so that a change of clock rate
or a busy neighbour meets all of them. Two timings of the same code give the noise; a difference
inside it is no result.
"""

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch._C._profiler import _EventType

Call = Callable[[], Any]
# zeros written before each timed call, in sizes of the L2 cache: they evict it, and hide the launch
# of what follows
_FLUSH_FACTOR = 4


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender, one a round.

    ``stolen`` is the share of all processors' time that a hypervisor took during the rounds.
    """

    ms: tuple[float, ...]
    stolen: float | None = None

    @property
    def p20(self) -> float:
        return float(np.percentile(self.ms, 20))

    @property
    def p50(self) -> float:
        return float(np.percentile(self.ms, 50))

    @property
    def p80(self) -> float:
        return float(np.percentile(self.ms, 80))

    def speedup_over(self, other: "Timing") -> float:
        """Median over the rounds of other / self: what both met in one round cancels."""
        ratios = [theirs / ours for ours, theirs in zip(self.ms, other.ms, strict=True)]
        return float(np.percentile(ratios, 50))


class Clock(Protocol):
    def prepare(self, calls: Sequence[Call]) -> Callable[[int], float]:
        """A function of the round that runs one of ``calls`` and returns its milliseconds."""


class HostClock:
    """perf_counter around the call; on a GPU around the call and the wait for its end."""

    def __init__(self, device: torch.device | None = None):
        on_gpu = device is not None and device.type == "cuda"
        self.wait = torch.cuda.synchronize if on_gpu else lambda: None

    def prepare(self, calls: Sequence[Call]) -> Callable[[int], float]:
        def sample(i: int) -> float:
            self.wait()
            began = time.perf_counter()
            calls[i % len(calls)]()
            self.wait()
            return 1e3 * (time.perf_counter() - began)

        return sample


class EventClock:
    """CUDA events around the call, on a cold L2.

    Launches count where the host is slower than the device, as they do for eager users.
    """

    def __init__(self, device: torch.device):
        self.flush = torch.empty(_FLUSH_FACTOR * l2_bytes(device), dtype=torch.int8, device=device)

    def prepare(self, calls: Sequence[Call]) -> Callable[[int], float]:
        def sample(i: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            calls[i % len(calls)]()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        return sample


class GraphClock(EventClock):
    """CUDA events around the replay of a captured graph, on a cold L2: device time alone.

    A backward runs on the stream of its forward, and the default stream cannot be captured: calls
    are built, and everything here runs, inside ``side_stream``.
    """

    def prepare(self, calls: Sequence[Call]) -> Callable[[int], float]:
        for call in calls:  # lazy compilation and allocator growth happen outside the capture
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graphs: list[torch.cuda.CUDAGraph] = []
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            # results may overwrite each other: nobody reads them
            pool = graphs[0].pool() if graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                call()
            graphs.append(graph)
        return super().prepare([graph.replay for graph in graphs])


def side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """A stream of its own on a GPU, nothing elsewhere."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def interleaved(
    contenders: Mapping[str, Sequence[Call]],
    *,
    rounds: int,
    warmup: int,
    clock: Clock,
    failed: dict[str, str] | None = None,
    deadline: float | None = None,
    least: int = 1,
) -> dict[str, Timing]:
    """Time contenders in turn: every round runs each of them once, and begins with another one.

    Args:
        contenders: name -> calls that differ in nothing but their inputs; round r takes number r.
        rounds, warmup: timed and untimed runs of each.
        failed: takes name -> error of contenders that fail before the first timed round, and the
            others go on; None raises.
        deadline: time.monotonic() after which no further round begins, once ``least`` are run.
    """
    samples: dict[str, Callable[[int], float]] = {}
    for name, calls in contenders.items():
        try:
            sample = clock.prepare(calls)
            for i in range(warmup):
                sample(i)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = first_line(error)
        else:
            samples[name] = sample
    ms: dict[str, list[float]] = {name: [] for name in samples}
    names = list(samples)
    before = _processor_ticks()
    for r in range(rounds):
        if r >= least and deadline is not None and time.monotonic() > deadline:
            break
        turn = r % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            ms[name].append(samples[name](r))
    after = _processor_ticks()
    stolen = None
    if before and after and after[0] - before[0] >= _FEWEST_TICKS:
        stolen = (after[1] - before[1]) / (after[0] - before[0])
    return {name: Timing(tuple(values), stolen) for name, values in ms.items()}


_FEWEST_TICKS = 100  # of a hundredth of a second: of fewer one alone would be a large share


def _processor_ticks(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """All ticks of all processors since the start, and those stolen, if Linux tells (proc(5))."""
    if not stat.exists():
        return None
    # guests' time is part of user's
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[7]


def first_line(error: BaseException) -> str:
    """An error in one line, for a table's footnote."""
    text = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {text}"[:300]


def l2_bytes(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes that torch's allocators hand out at the peak of ``call``, beyond those before it.

    On the CPU they are counted from the profiler's memory events, since the resident size of the
    process hides reused memory. What a library allocates for itself (oneDNN's scratch, a C++
    kernel's buffers) is not seen there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    live: dict[int, int] = {}  # bytes by address
    total = peak = 0
    tree = profile.profiler.kineto_results.experimental_event_tree()
    for event in sorted(_allocations(tree), key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            live[address] = size
            total += size
        else:
            # what was there before, such as the last step's gradients, is none of the call's; the
            # profiler may even give it another's size
            total -= live.pop(address, 0)
        peak = max(peak, total)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def peak_resident(call: Call) -> int | None:
    """Bytes of the process at its peak while ``call`` runs, libraries' buffers included.

    None where Linux does not tell.
    """
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        refs.write_text("5")  # the high-water mark falls to the present size
    except OSError:
        call()
        return None
    call()
    mark = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(mark.split()[1]) * 1024


def keep_host_memory() -> None:
    """Have this process keep freed memory.

    glibc gives blocks of 32 MiB and more back at once, and a call that is timed alone may then take
    longer for fresh pages than for its work. A whole step hardly notices (docs/notes).
    """
    if platform.system() == "Linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def trim_host_memory() -> None:
    """Give freed memory of large cases back to the system (glibc keeps it otherwise)."""
    if platform.system() == "Linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
