"""What a run tells of itself: metrics.jsonl, times, the spread of embeddings, the stop at a nan."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .loggers import Logger

METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl, one line a logged step, and the loggers beside it.

    The file is the truth: a continued run drops its lines beyond the checkpoint, and what follows
    is written again.
    """

    def __init__(self, folder: Path, start: int, loggers: Sequence[Logger] = ()):
        path = folder / METRICS
        # a killed run may leave half a line
        text = path.read_text() if path.exists() else ""
        whole_lines = text.rpartition("\n")[0].splitlines()
        kept = [line + "\n" for line in whole_lines if json.loads(line)["step"] <= start]
        if "".join(kept) != text or not path.exists():
            write_text(path, "".join(kept))
        self.file = path.open("a")
        self.loggers = loggers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A line of JSON; what is not finite is null."""
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **told}, allow_nan=False) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger.write(step, values)

    def close(self) -> None:
        self.file.close()
        for logger in self.loggers:
            logger.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl; of one still written, those that are whole."""
    whole_lines = Path(path).read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in whole_lines]


class Timer:
    """Where a run's time goes between two logged steps.

    Args:
        waited: seconds that its batches were waited for so far, as ``ClipLoader`` counts them.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        self._waited = waited
        self.reset()

    def reset(self) -> None:
        self._began, self._before = time.perf_counter(), self._waited()
        self._steps = self._clips = 0

    def step(self, clips: int) -> None:
        self._steps += 1
        self._clips += clips

    def take(
        self, over_ranks: Callable[[dict[str, float]], dict[str, float]] = lambda x: x
    ) -> dict[str, float]:
        """Clips a second, and seconds a step in all and waiting for data, since the last time.

        Args:
            over_ranks: each value's largest on any rank.
        """
        seconds = time.perf_counter() - self._began
        slowest = over_ranks(
            {
                "step_seconds": seconds / self._steps,
                "data_wait_seconds": (self._waited() - self._before) / self._steps,
            }
        )
        clips = self._clips / self._steps
        found = {"clips_per_second": clips / slowest["step_seconds"], **slowest}
        self.reset()
        return found


# metric -> the embedding, and whose ``valid`` says which count
_COSINES = {
    "cosine_video_va": ("z_video_va", "video"),
    "cosine_audio_va": ("z_audio_va", "audio"),
    "cosine_video_vt": ("z_video_vt", "video"),
    "cosine_text_vt": ("z_text_vt", "text"),
}


def mean_cosines(
    output: Any,
    valid: Mapping[str, Any],
    *,
    xp: Any,
    over_devices: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Any]:
    """How alike a batch's embeddings are: the mean cosine between two valid ones of a kind.

    1: all are one vector, the model has collapsed; 0: they point everywhere, or are fewer than two.
    It takes the sum of the unit vectors, no matrix of pairs.

    Args:
        output: a ``VATTOutput`` of torch or JAX (``xp``), detached.
        valid: video_valid (B,), audio_valid (B,), text_valid (B, P).
        over_devices: sums an array over the devices that share the batch.

    Returns:
        scalar arrays, by metric, of the embeddings that are there.
    """
    found = {}
    for metric, (name, modality) in _COSINES.items():
        if (z := getattr(output, name)) is None:
            continue
        counts = valid[f"{modality}_valid"].reshape(-1, 1)
        z = z.reshape(-1, z.shape[-1])
        z = z * xp.ones_like(z[:1, :1], dtype=xp.float32)
        length = xp.sqrt((z * z).sum(-1))[:, None]
        unit = xp.where(counts & (length > 0), z / length, xp.zeros_like(z))
        total, count = over_devices(unit.sum(0)), over_devices((counts * 1.0).sum())
        pairs = xp.where(count > 1, count * (count - 1), xp.ones_like(count))
        cosine = ((total * total).sum() - count) / pairs
        found[metric] = xp.where(count > 1, cosine, xp.zeros_like(cosine))
    return found


class NonFiniteError(ArithmeticError):
    """A loss or gradient is nan or infinite."""


class Mean:
    """The mean of values that may still be on their way."""

    def __init__(self) -> None:
        self._values: list[Any] = []

    def add(self, value: Any) -> None:
        self._values.append(value)

    def take(self) -> float:
        """The mean of those added since the last time."""
        values, self._values = [float(value) for value in self._values], []
        return sum(values) / len(values)


class FiniteWatch:
    """Stops a run at the first loss or gradient that is not finite.

    Values are looked at one step later, when a GPU has them anyway: asking at once would make it
    wait for the host in every step.
    """

    def __init__(self):
        self._waiting: deque[tuple[int, Sequence[str], dict[str, Any]]] = deque()

    def add(self, step: int, files: Sequence[str], values: dict[str, Any]) -> None:
        """Note a step's ``values``, numbers or arrays of one, and check those of the step before.

        Raises:
            NonFiniteError: naming the step, the values and the files of its batch.
        """
        self._waiting.append((step, files, values))
        self._check(beside=1)

    def check(self) -> None:
        """Check all steps noted. Raises NonFiniteError."""
        self._check(beside=0)

    def _check(self, beside: int) -> None:
        while len(self._waiting) > beside:
            step, files, values = self._waiting.popleft()
            found = {name: float(value) for name, value in values.items() if value is not None}
            if not all(map(math.isfinite, found.values())):
                told = ", ".join(f"{name} {value:g}" for name, value in found.items())
                more = f" and {len(files) - 8} more" if len(files) > 8 else ""
                raise NonFiniteError(
                    f"step {step} is not finite: {told}; its clips are of "
                    f"{', '.join(files[:8])}{more}"
                )
