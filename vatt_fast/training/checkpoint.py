"""Where a run stands: weights, Adam's state and step, in one safetensors file.

The file is replaced whole. Both frameworks write the same format.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..model import VATT
from ..weights import load_metadata, load_tensors, load_weights, save_tensors

_MODEL, _OPTIMIZER = "model/", "optimizer/"


def save_checkpoint(
    path: Path, model: VATT, optimizer: torch.optim.Optimizer, *, step: int, run: dict
) -> None:
    """Write the state after ``step`` steps.

    ``run`` is the JSON-able description that a resumed run must match.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments: dict[str, dict[str, Tensor]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            moments.setdefault(key, {})[names[parameter]] = value
    write_state(path, model.state_dict(), moments, step=step, run=run)


def load_checkpoint(path: Path, model: VATT, optimizer: torch.optim.Optimizer, *, run: dict) -> int:
    """Restore what ``save_checkpoint`` wrote; returns the number of steps done.

    Raises ValueError as ``read_state`` does.
    """
    weights, moments, step = read_state(path, run=run)
    load_weights(model, weights, source=str(path))
    parameters = dict(model.named_parameters())
    for key, values in moments.items():
        for name, value in values.items():
            owner = parameters[name]
            optimizer.state[owner][key] = value.to(owner.device)  # a fused Adam's step counter too
    return step


def write_state(
    path: Path,
    weights: dict[str, Tensor],
    moments: dict[str, dict[str, Tensor]],
    *,
    step: int,
    run: dict,
) -> None:
    """Write a checkpoint.

    Args:
        weights: the torch model's state dict.
        moments: Adam's step, exp_avg and exp_avg_sq, each by the weight's name.
    """
    tensors = {_MODEL + name: value for name, value in weights.items()}
    for key, values in moments.items():
        tensors |= {f"{_OPTIMIZER}{key}/{name}": value for name, value in values.items()}
    save_tensors(tensors, path, metadata={"step": str(step), "run": json.dumps(run)})


def read_state(
    path: Path, *, run: dict
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], int]:
    """Weights, moments and the number of steps done, as ``write_state`` took them.

    Raises:
        ValueError: the file is cut short, or belongs to another run (the message names the first
            differing settings).
    """
    tensors = load_tensors(path)
    metadata = load_metadata(path)
    saved = json.loads(metadata["run"])
    if saved != run:
        differing = [key for key in sorted({*saved, *run}) if saved.get(key) != run.get(key)]
        shown = "; ".join(
            f"{key} was {saved.get(key)!r}, now {run.get(key)!r}" for key in differing[:3]
        )
        raise ValueError(
            f"{path} belongs to another run ({shown}); "
            "choose another output folder, or delete this one"
        )
    weights = {
        name.removeprefix(_MODEL): value
        for name, value in tensors.items()
        if name.startswith(_MODEL)
    }
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            key, _, weight = name.removeprefix(_OPTIMIZER).partition("/")
            moments.setdefault(key, {})[weight] = value
    return weights, moments, int(metadata["step"])
