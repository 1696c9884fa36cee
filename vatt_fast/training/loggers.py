"""Where a run's values go besides metrics.jsonl: TensorBoard, Weights & Biases.

Each is a class with ``write`` and ``close``; another one is a class more and a line in ``LOGGERS``.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step; what is not finite comes as it is."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. A continued run hides what lies beyond its checkpoint."""

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class WandB:
    """A run of Weights & Biases, which its own environment variables configure (WANDB_MODE, ...).

    A continued run continues the same one: its id is kept in the run's folder. Steps that a kill
    undid are overwritten on the axis "step", not in wandb's own count.
    """

    ID = "wandb_id.txt"

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]):
        import wandb

        kept = folder / self.ID
        if not kept.exists():
            from ..files import write_text

            named = f"{folder.absolute()} {json.dumps(settings, sort_keys=True)}"
            write_text(kept, hashlib.sha256(named.encode()).hexdigest()[:12])
        self.run = wandb.init(
            project="vatt_fast",
            name=folder.absolute().name,
            id=kept.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


# the class, the package it needs, how to get that
LOGGERS: dict[str, tuple[type, str, str]] = {
    "tensorboard": (TensorBoard, "tensorboard", "pip install 'vatt_fast[train]'"),
    "wandb": (WandB, "wandb", "pip install wandb"),
}
_NONE = "none"


def names_of(asked: str | None) -> tuple[str, ...]:
    """The loggers that a setting such as "tensorboard,wandb" names.

    None: TensorBoard where it is installed.

    Raises:
        ValueError: an unknown one, or one that is not installed.
    """
    if asked is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    if asked == _NONE:
        return ()
    names = tuple(asked.split(","))
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"loggers is {asked!r}; {name!r} is none of {', '.join(LOGGERS)} "
                f"(joined by commas), {_NONE}"
            )
        _, package, how = LOGGERS[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"loggers asks for {name}, which is not installed: {how}")
    return tuple(dict.fromkeys(names))


def make_loggers(
    asked: str | None, folder: Path, start: int, settings: Mapping[str, Any]
) -> list[Logger]:
    """What ``names_of`` names, for a run that stands at step ``start``.

    Args:
        settings: of the run, for loggers that show them.
    """
    return [LOGGERS[name][0](folder, start, settings) for name in names_of(asked)]
