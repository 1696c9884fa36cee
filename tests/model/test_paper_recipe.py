"""The ``paper`` recipe has no recording: it is held against plain double loops in fp64.

And its gradients against finite differences.
"""

import dataclasses

import numpy as np
import plain_vatt
import pytest
import torch

from vatt_fast.config import TowerConfig, VATTConfig
from vatt_fast.losses import contrastive_terms, nce_terms, vatt_loss
from vatt_fast.model import VATT

TOWER = TowerConfig(depth=2, dim=12, mlp_dim=16, num_heads=2, head_dim=4)
CONFIG = VATTConfig(
    video=TOWER,
    audio=TOWER,
    text=dataclasses.replace(TOWER, dim=8),
    frames=4,
    height=4,
    width=8,
    video_patch=(2, 2, 4),
    samples=40,
    audio_patch=8,
    words=12,
    texts_per_clip=3,
    vocab_size=20,
    d_va=6,
    d_vt=5,
)
CLIPS = 5


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(1, 20, (CLIPS, 3, 12), generator=generator)
    text[0, 0, 5:] = 0
    text[1, 2] = 0  # no words at all: AGG alone
    return dict(
        video=torch.randint(0, 256, (CLIPS, 4, 4, 8, 3), dtype=torch.uint8, generator=generator),
        audio=torch.rand(CLIPS, 40, dtype=torch.float64, generator=generator) * 2 - 1,
        text=text,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = VATT(CONFIG).double().train()
    with torch.no_grad():  # away from the ones and zeros of the initialisation
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.log_scale.fill_(-np.log(CONFIG.temperature))
    return model


VALID = dict(
    video_valid=torch.tensor([True, True, True, False, True]),
    audio_valid=torch.tensor([True, True, False, True, True]),
    text_valid=torch.tensor(
        [[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]], dtype=torch.bool
    ),
)
KEEP = dict(video_keep=torch.tensor([0, 3, 5, 6]), audio_keep=torch.tensor([1, 2, 4]))


@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_plain_double_loops(model, batch, masked):
    valid = VALID if masked else {name: torch.ones_like(value) for name, value in VALID.items()}
    out = model(**batch, **KEEP, **(valid if masked else {}))
    ours = vatt_loss(out, CONFIG, **(valid if masked else {})).total.item()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    arrays = {name: value.numpy() for name, value in (batch | KEEP | valid).items()}
    plain = plain_vatt.loss(weights, CONFIG, **arrays)
    assert ours == pytest.approx(plain, rel=1e-9)


def test_gradients_of_the_whole_model_match_finite_differences(model, batch):
    """Along a random direction in all weights: every gradient takes part."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss():
        return vatt_loss(model(**batch, **KEEP, **VALID), CONFIG, **VALID).total

    gradients = torch.autograd.grad(loss(), parameters)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += step * d
                values.append(loss().item())
                for p, d in zip(parameters, direction, strict=True):
                    p -= step * d
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("form", ["paper", "released", "symmetric"])
def test_gradcheck_of_the_loss_terms(form):
    torch.manual_seed(1)
    x, y = (
        torch.randn(4, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True),
    )
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    masks = dict(
        x_valid=torch.tensor([True, False, True, True]),
        y_valid=torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]]).bool(),
    )
    for options in ({}, masks):
        assert torch.autograd.gradcheck(
            lambda x, y, s, o=options: contrastive_terms(x, y, scale=s, form=form, **o)[0],
            (x, y, scale),
        )


@pytest.mark.parametrize("form", ["paper", "released", "symmetric"])
def test_forms_as_published(form):
    """From the definitions, on a batch small enough to write the sums out."""
    scores = torch.randn(4, 4, 3, dtype=torch.float64)  # clip, clip of text, text
    e = scores.exp()
    for i in range(4):
        row, col, pos = e[i].sum(), e[:, i].sum(), e[i, i].sum()
        expected = {
            "paper": -(pos / (row + col - pos)).log(),
            "released": -(pos / (row + col)).log(),
            "symmetric": -(pos / row).log() - (pos / col).log(),
        }[form]
        torch.testing.assert_close(nce_terms(row.log(), col.log(), pos.log(), form), expected)
