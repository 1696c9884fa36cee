"""Where a run stands: weights, Adam's state, step, settings and data, in one safetensors file.

The file is replaced whole. Both frameworks write the same format.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.source import CONTENT
from ..files import link
from ..weights import (
    load_metadata,
    load_tensors,
    load_weights,
    save_tensors,
)

CHECKPOINT, BEST = "checkpoint.safetensors", "best"
STANDING = "standing.json"  # in the folder of a checkpoint that lies in shards: see shards.py
MODEL, OPTIMIZER = "model/", "optimizer/"
_ORDER = "order of clips"  # where it is missing, the run began under the first rules


class Data(NamedTuple):
    """What a run is trained on, told by what it holds, not by how its folder is spelled.

    It is a source's ``identity``, and the weights of several.
    """

    files: int
    bytes: int
    digest: str  # of the files' names and sizes
    captions: str  # digest of the captions; "" without
    weights: str = ""  # ``shares_of``; "" for one source, and in earlier versions' checkpoints

    def changes_since(self, was: "Data") -> str:
        """ "" where nothing has changed."""
        told = []
        if (was.files, was.bytes) != (self.files, self.bytes):
            told.append(
                f"{was.files} files of {was.bytes} bytes are now {self.files} of {self.bytes}"
            )
        elif was.digest != self.digest:
            told.append("files have other names or sizes")
        # earlier versions noted a digest of captions.json, which says nothing of its content
        of_a_file = was.captions and not was.captions.startswith(CONTENT)
        if was.captions != self.captions and not (of_a_file and self.captions):
            told.append("the captions were edited")
        if was.weights and self.weights and was.weights != self.weights:
            told.append(f"the sources' weights were {was.weights}, now {self.weights}")
        return "; ".join(told)


class Standing(NamedTuple):
    """What a checkpoint says of its run, beside the tensors."""

    step: int  # steps done
    run: dict[str, Any]  # ``settings.describe``
    data: Data | None = None  # None: written before it was noted
    # what a run may change, and must say so: precision and shares of DropToken's draws
    arithmetic: dict[str, Any] | None = None
    best_loss: float | None = None  # the lowest mean loss between two checkpoints so far
    best_score: float | None = None  # the highest on held-out media so far, where best/ is by it

    def metadata(self) -> dict[str, str]:
        run = self.run if self.data is None else self.run | {"data": self.data._asdict()}
        noted: dict[str, Any] = {"arithmetic": self.arithmetic, "best_loss": self.best_loss}
        if self.best_score is not None:
            noted["best_score"] = self.best_score
        return {"step": str(self.step), "run": json.dumps(run), "noted": json.dumps(noted)}


def read_standing(path: Path) -> Standing:
    """What a checkpoint, a file or a folder of shards, says of its run; tensors are not read.

    Raises ValueError for a damaged one.
    """
    try:
        metadata = read_noted(path)
        run, step = json.loads(metadata["run"]), int(metadata["step"])
        if not isinstance(run["model"], dict):
            raise ValueError("it describes no model")
        data = run.pop("data", None)
        data = Data(**data) if isinstance(data, dict) else None
        noted = json.loads(metadata.get("noted", "{}"))
        if "best_retrieval" in noted:  # as earlier versions called it in pre-training
            noted["best_score"] = noted.pop("best_retrieval")
        return Standing(step, run, data, **noted)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint; it was cut short or damaged: delete it, or put "
            "an earlier one in its place"
        ) from error


def read_noted(path: Path) -> dict[str, Any]:
    """``Standing.metadata`` as it lies in a checkpoint, with what shards note beside it."""
    return json.loads((path / STANDING).read_text()) if path.is_dir() else load_metadata(path)


def check_same_run(path: Path, told: list[str]) -> None:
    """Raise ValueError where the checkpoint at ``path`` belongs to another run.

    Args:
        told: the differences of their settings.
    """
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(told[:3])}{more}); "
            "choose another output folder, or delete this one"
        )


def say_what_changed(path: Path, was: Standing, data: Data, arithmetic: dict[str, Any]) -> None:
    """Warn of what a run may change, but goes on otherwise than it would have."""
    told = [data.changes_since(was.data)] if was.data is not None else []
    before = {_ORDER: 1} | (was.arithmetic or {})
    told += [
        f"{name} was {value}, now {arithmetic[name]}"
        for name, value in before.items()
        if value != arithmetic[name]
    ]
    if told := list(filter(None, told)):
        warnings.warn(
            f"since {path} was written, {'; '.join(told)}: from step {was.step} on the run is not "
            "what it would have been",
            stacklevel=4,
        )


def save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    standing: Standing,
) -> None:
    """Write a model's and its optimizer's state. Raises OSError; then the old file is intact."""
    save_tensors(named_state(model, optimizer), path, metadata=standing.metadata())


def named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names in it; in shards where ``model`` is."""
    tensors = {MODEL + name: value for name, value in model.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{OPTIMIZER}{key}/{names[parameter]}"] = value
    return tensors


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what ``save_checkpoint`` wrote, in shards where ``model`` lies in shards.

    Raises ValueError as ``read_state`` does.
    """
    weights, moments = read_state(path)
    like = model.state_dict()
    placed = {name: as_sharded(value, like.get(name)) for name, value in weights.items()}
    load_weights(model, placed, source=str(path))
    parameters = dict(model.named_parameters())
    for key, values in moments.items():
        for name, value in values.items():
            owner = parameters[name]
            value = value.to(owner.device)  # a fused Adam's step counter too
            optimizer.state[owner][key] = value if key == "step" else as_sharded(value, owner)


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor; their module is not imported for that."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Tensor:
    """A tensor with all of its shards, on the CPU if it had some; all processes must call."""
    return value.full_tensor().cpu() if is_sharded(value) else value


def as_sharded(value: Tensor, like: Any) -> Tensor:
    """This process's shard of a whole tensor, which all processes have, where ``like`` has one."""
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def write_state(
    path: Path,
    weights: dict[str, Tensor],
    moments: dict[str, dict[str, Tensor]],
    standing: Standing,
) -> None:
    """Write a checkpoint.

    Args:
        weights: the torch model's state dict.
        moments: Adam's step, exp_avg and exp_avg_sq, each by the weight's name.
    """
    tensors = {MODEL + name: value for name, value in weights.items()}
    for key, values in moments.items():
        tensors |= {f"{OPTIMIZER}{key}/{name}": value for name, value in values.items()}
    save_tensors(tensors, path, metadata=standing.metadata())


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Weights and moments, as ``write_state`` took them. Raises ValueError: the file is damaged."""
    tensors = load_tensors(path)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            key, _, weight = name.removeprefix(OPTIMIZER).partition("/")
            moments.setdefault(key, {})[weight] = value
    return model_weights(tensors), moments


def model_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors that are the model's state dict."""
    return {
        name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)
    }


# -- earlier and best ones -------------------------------------------------------------------------


def link_best(out: Path, files: Sequence[str]) -> None:
    """Make the model in a run folder, of these files, the best one so far."""
    (out / BEST).mkdir(exist_ok=True)
    for name in files:
        if (out / name).exists():
            link(out / name, out / BEST / name)


def keep_earlier(path: Path, keep_last: int) -> None:
    """Give the checkpoint at ``path``, which will be replaced, a name with its step.

    ``keep_last`` counts the one that will stand at ``path``; older ones beyond it are deleted.
    """
    if keep_last > 1 and path.exists():
        step = read_standing(path).step
        link(path, path.with_stem(f"{path.stem}_{step:08d}"))
    kept = sorted(path.parent.glob(f"{path.stem}_????????{path.suffix}"), reverse=True)
    for old in kept[keep_last - 1 :]:
        old.unlink()
