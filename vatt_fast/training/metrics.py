"""What a run tells of itself: metrics.jsonl and TensorBoard events, and the stop at a nan."""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_text

METRICS = "metrics.jsonl"


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
        kept = [line + "\n" for line in whole_lines if json.loads(line)["step"] <= start]
        if "".join(kept) != text or not path.exists():
            write_text(path, "".join(kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line of JSON; what is not finite is null."""
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **told}, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


class NonFiniteError(ArithmeticError):
    """A loss or gradient is nan or infinite."""


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
