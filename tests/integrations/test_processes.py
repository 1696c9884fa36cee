"""The loss shells on two processes have value and gradients of the library's own on two."""

import functools
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAIRS, DIM = 6, 8
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def clip(ours: bool, rank: int, world: int, **options):
    import open_clip

    from vatt_fast.integrations import open_clip as integration

    made = integration if ours else open_clip
    loss = made.ClipLoss(rank=rank, world_size=world, **options)
    return lambda x, y, _: loss(x, y, torch.tensor([9.0]))


def nt_xent(ours: bool, rank: int, world: int):
    from lightly.loss import ntx_ent_loss

    from vatt_fast.integrations import lightly as integration

    made = integration if ours else ntx_ent_loss
    loss = made.NTXentLoss(0.2, gather_distributed=True)
    return lambda x, y, _: loss(x, y)


def ranking(ours: bool, rank: int, world: int, **options):
    from sentence_transformers.sentence_transformer import losses

    from vatt_fast.integrations import sentence_transformers as integration

    made = integration if ours else losses
    model = nn.Sequential(nn.Identity())
    options = dict(directions=EVERY, gather_across_devices=True) | options
    loss = made.MultipleNegativesRankingLoss(model, **options)
    return lambda *z: loss.compute_loss_from_embeddings(list(z), None)


CASES = {
    "clip-local": ("open_clip", clip, dict(local_loss=True, gather_with_grad=True)),
    "clip-global": ("open_clip", clip, dict(gather_with_grad=True)),
    "clip-own-gradients": ("open_clip", clip, {}),
    "nt_xent": ("lightly", nt_xent, {}),
    "ranking": ("sentence_transformers", ranking, {}),
}


def both(rank, world, names):
    """{case: ((value, gradients) of ours, of theirs)} in one process."""
    runpy.run_path(str(ROOT / "bench" / "without_torchvision.py"))["stand_in"]()
    found = {}
    for name in names:
        _, make, options = CASES[name]
        results = []
        for ours in (True, False):
            generator = torch.Generator().manual_seed(rank)
            z = [torch.randn(PAIRS, DIM, generator=generator) for _ in range(3)]
            z = [F.normalize(each, dim=1).requires_grad_() for each in z]
            value = make(ours, rank, world, **options)(*z)
            value.backward()
            gradients = [each.grad for each in z if each.grad is not None]
            results.append((value.detach(), torch.cat(gradients)))
        found[name] = results
    return found


@functools.cache
def results():
    # not in the processes, where only installed packages are
    from bench.integration_cases import missing

    names = [name for name, (library, *_) in CASES.items() if not missing(library)]
    return in_processes(2, both, names)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_the_librarys(name):
    from bench.integration_cases import missing

    if reason := missing(CASES[name][0]):
        pytest.skip(reason)
    for found in results():
        ours, theirs = found[name]
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
