"""Where a run stands, in one safetensors file that is replaced whole: weights, Adam's state, step."""

import json
from pathlib import Path

import torch

from ..model import VATT
from ..weights import load_metadata, load_tensors, load_weights, save_tensors

_MODEL, _OPTIMIZER = "model/", "optimizer/"


def save_checkpoint(path: Path, model: VATT, optimizer: torch.optim.Optimizer, *, step: int, run: dict) -> None:
    """Write the state after ``step`` steps. ``run`` is the JSON-able description that a resumed run must match."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {_MODEL + name: value for name, value in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{_OPTIMIZER}{key}/{names[parameter]}": value for key, value in state.items()}
    save_tensors(tensors, path, metadata={"step": str(step), "run": json.dumps(run)})


def load_checkpoint(path: Path, model: VATT, optimizer: torch.optim.Optimizer, *, run: dict) -> int:
    """Restore what ``save_checkpoint`` wrote; returns the number of steps done.

    Raises:
        ValueError: the file is cut short, or belongs to another run (the message names the first differing settings).
    """
    tensors = load_tensors(path)
    metadata = load_metadata(path)
    saved = json.loads(metadata["run"])
    if saved != run:
        differing = [key for key in sorted({*saved, *run}) if saved.get(key) != run.get(key)]
        shown = "; ".join(f"{key} was {saved.get(key)!r}, now {run.get(key)!r}" for key in differing[:3])
        raise ValueError(f"{path} belongs to another run ({shown}); choose another output folder, or delete this one")
    weights = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
    load_weights(model, weights, source=str(path))
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            key, _, parameter = name.removeprefix(_OPTIMIZER).partition("/")
            owner = parameters[parameter]
            # Adam keeps its step counter on the CPU
            optimizer.state[owner][key] = value if key == "step" else value.to(owner.device)
    return int(metadata["step"])
