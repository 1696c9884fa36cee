"""Contrastive losses of other packages on several processes, against themselves on one.

    python -m bench peer-losses --packages DIR

A package is right where W processes return the loss and the gradients that it has itself on one
process with the whole batch, of which the invalid pairs were taken out before. Value: the mean over
processes. Gradients: averaged over processes, as DistributedDataParallel does. What cannot be told
to a loss (masks) is left out of its call. DIR holds the packages, each installed by
``pip install --no-deps --target DIR``: open_clip_torch, lightly, sentence-transformers with what it
imports. The errors, as a Markdown table, go to standard output.
"""

import datetime
import importlib
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vatt_fast.collectives import process_group
from vatt_fast.losses import contrastive_terms, global_mean

_PAIRS, _DIM, _SCALE = 8, 16, 10.0
_Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


_Job = tuple[str, str]  # of _PEERS and _CASES


class _Case(NamedTuple):
    held: tuple[int, ...]  # pairs of each process
    invalid: tuple[int, ...] = ()  # pairs of the whole batch


_CASES = {
    "2 processes": _Case((4, 4)),
    "4 processes": _Case((2, 2, 2, 2)),
    "masked": _Case((4, 4), (0, 5)),
    "a process without a valid pair": _Case((4, 4), (0, 1, 2, 3)),
    "uneven": _Case((3, 5)),
}


def _open_clip(world: int, rank: int, **options: Any) -> _Loss:
    loss = importlib.import_module("open_clip.loss").ClipLoss(
        world_size=world, rank=rank, **options
    )

    def call(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        x, y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
        return loss(x, y, torch.tensor(_SCALE))

    return call


def _lightly(world: int, rank: int) -> _Loss:
    module = importlib.import_module("lightly.loss.ntx_ent_loss")
    loss = module.NTXentLoss(temperature=1 / _SCALE, gather_distributed=world > 1)
    return lambda x, y, valid: loss(x, y)


def _sentence_transformers(world: int, rank: int) -> _Loss:
    name = "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking"
    kind = importlib.import_module(name).MultipleNegativesRankingLoss
    both = ("query_to_doc", "doc_to_query")
    loss = kind(torch.nn.Identity(), _SCALE, gather_across_devices=world > 1, directions=both)
    return lambda x, y, valid: loss.compute_loss_from_embeddings([x, y], None)


def _ours(world: int, rank: int) -> _Loss:
    def call(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        options: dict[str, Any] = dict(scale=_SCALE, form="released")
        return global_mean(*contrastive_terms(x, y, x_valid=valid, y_valid=valid, **options))

    return call


_PEERS: dict[str, Callable[[int, int], _Loss]] = {
    "vatt_fast": _ours,
    "open_clip ClipLoss": _open_clip,
    "open_clip local_loss, gather_with_grad": lambda world, rank: _open_clip(
        world, rank, local_loss=world > 1, gather_with_grad=world > 1
    ),
    "lightly NTXentLoss": _lightly,
    "sentence-transformers MNRL, both directions": _sentence_transformers,
}


def _towers() -> torch.nn.ModuleList:
    torch.manual_seed(0)
    return torch.nn.ModuleList(torch.nn.Linear(_DIM, _DIM, bias=False) for _ in range(2))


def _loss_and_gradients(loss: _Loss, rows: Tensor, valid: Tensor | None) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, _PAIRS, _DIM, generator=draw)[:, rows]
    towers = _towers()
    value = loss(towers[0](inputs[0]), towers[1](inputs[1]), valid)
    value.backward()
    return [value.detach(), *(p.grad for p in towers.parameters() if p.grad is not None)]


def _process(rank: int, world: int, folder: str, packages: str, jobs: list[_Job]) -> None:
    torch.set_num_threads(1)
    _make_importable(packages)
    options: dict[str, Any] = dict(init_method=f"file://{folder}/rendezvous", rank=rank)
    options |= dict(world_size=world, timeout=datetime.timedelta(seconds=20))
    results = {}
    with process_group("gloo", **options):
        for peer, name in jobs:
            case = _CASES[name]
            first = sum(case.held[:rank])
            rows = torch.arange(first, first + case.held[rank])
            valid = torch.tensor([int(row) not in case.invalid for row in rows])
            found = _loss_and_gradients(_PEERS[peer](world, rank), rows, valid)
            for x in found:
                dist.all_reduce(x)
                x /= world
            results[peer, name] = found
        if rank == 0:
            torch.save(results, Path(folder) / "found.pt")
        dist.barrier()


def _run(packages: str, jobs: list[_Job]) -> dict[_Job, str]:
    """{job: "loss error / gradient error", both relative, or what happened instead}."""
    world = len(_CASES[jobs[0][1]].held)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_process, (world, folder, packages, jobs), nprocs=world)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            print(f"{jobs}: {last}", file=sys.stderr)
            waited = "imed out" in last or "Connection closed by peer" in last
            died = isinstance(error, mp.ProcessExitedException)
            end = "waits for ever" if waited else "aborts" if died else "fails"
            return dict.fromkeys(jobs, end)
        found = torch.load(Path(folder) / "found.pt")
    return {job: _errors(job, found[job]) for job in jobs}


def _errors(job: _Job, found: list[Tensor]) -> str:
    peer, name = job
    kept = torch.tensor([row for row in range(_PAIRS) if row not in _CASES[name].invalid])
    expected = _loss_and_gradients(_PEERS[peer](1, 0), kept, None)
    errors = [
        float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
        for a, b in (
            (found[0], expected[0]),
            (torch.cat(found[1:]), torch.cat(expected[1:])),
        )
    ]
    return " / ".join("exact" if error < 1e-5 else f"{error:.1%}" for error in errors)


def _make_importable(packages: str) -> None:
    """The losses' modules without their packages' own imports, such as torchvision."""
    sys.path.append(packages)
    for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules",
                 "lightly.utils", "open_clip"):  # fmt: skip
        module = types.ModuleType(name)
        module.__path__ = [str(Path(packages, *name.split(".")))]
        sys.modules[name] = module
    vision = types.ModuleType("torchvision.ops")
    vision.StochasticDepth = object  # type: ignore[attr-defined]  # lightly names it, for ViTs
    sys.modules["torchvision.ops"] = vision


def run(packages: str) -> int:
    """Print the table of the packages in a folder."""
    _make_importable(packages)
    jobs = [(peer, name) for peer in _PEERS for name in _CASES]
    # what waits for ever takes its processes along
    together = [[job for job in jobs if job[1] == "4 processes"]]
    together += [[job for job in jobs if job[1] not in ("4 processes", "uneven")]]
    together += [[job] for job in jobs if job[1] == "uneven"]
    cells: dict[_Job, str] = {}
    for part in together:
        cells |= _run(packages, part)
    print("| loss / gradients |", " | ".join(_CASES), "|")
    print("|---" * (len(_CASES) + 1) + "|")
    for peer in _PEERS:
        print(f"| {peer} |", " | ".join(cells[peer, name] for name in _CASES), "|")
    return 0
