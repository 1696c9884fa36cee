"""The ops under torch's transforms and copies: they work, or are refused in one sentence."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vatt_fast.kernels import attention, contrastive_lse, drop_token, patch_embed
from vatt_fast.kernels.contrastive_lse import others


class Block(nn.Module):
    """All four ops in one module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 12) / 4)
        self.bias = nn.Parameter(torch.zeros(16))
        self.register_buffer("keep", torch.tensor([0, 2, 3]))

    def forward(self, patches):
        x = patch_embed(patches, self.weight, self.bias, scale=1.0, shift=0.0)
        x = drop_token(x, self.keep).unflatten(-1, (2, 8))
        out, _ = attention(x, x, x, scale=8**-0.5, causal=True)
        z = out.flatten(2).mean(1)
        row, col, pos = contrastive_lse(z, z, scale=2.0, exclude_own=True)
        return (row + col - pos).mean()


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block(), torch.randn(4, 5, 12)


def test_copies_and_pickles_give_the_same_loss(block):
    module, x = block
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_the_meta_device_gives_shapes(block):
    module, x = block
    loss = module.to("meta")(x.to("meta"))
    assert loss.device.type == "meta" and loss.shape == ()


def test_functional_call_and_func_grad_are_backward(block):
    module, x = block
    module(x).backward()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,))

    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, module.get_parameter(name).grad)


torch.manual_seed(1)
WEIGHT, BIAS, KEEP = torch.randn(6, 12), torch.randn(6), torch.tensor([0, 2])
TOKENS, Q, Z = torch.randn(2, 5, 12), torch.randn(2, 5, 2, 8), torch.randn(6, 8)
# a function of one tensor, and many of those tensors, each of its own values
CALLS = {
    "attention": (
        lambda q: torch.cat([x.flatten() for x in attention(q, q, q, scale=0.3, causal=True)]),
        torch.randn(3, 2, 5, 2, 8),
    ),
    "attention-bias": (
        lambda bias: attention(Q, Q, Q, scale=0.3, bias=bias)[0],
        torch.randn(3, 2, 5, 5),
    ),
    "patch_embed": (
        lambda p: patch_embed(p, WEIGHT, BIAS, scale=0.5, shift=1.0),
        torch.randn(3, 2, 5, 12),
    ),
    "patch_embed-kept": (
        lambda p: patch_embed(
            p, WEIGHT, BIAS, TOKENS[0, :, :6], KEEP, scale=0.5, shift=1.0, agg=BIAS
        ),
        torch.randn(3, 2, 5, 12),
    ),
    "patch_embed-weight": (
        lambda w: patch_embed(TOKENS, w, BIAS, scale=0.5, shift=1.0),
        torch.randn(3, 6, 12),
    ),
    "drop_token": (lambda x: drop_token(x, KEEP), torch.randn(3, 2, 5, 12)),
    "contrastive_lse": (
        lambda z: torch.cat(contrastive_lse(z, z.flip(0), scale=2.0)),
        torch.randn(3, 6, 8),
    ),
    "contrastive_lse-texts": (
        lambda z: torch.cat(contrastive_lse(Z, z, scale=2.0, texts_per_clip=2, extra_texts=1)),
        torch.randn(3, 13, 8),
    ),
    "contrastive_lse-scale": (
        lambda scale: torch.cat(contrastive_lse(Z, Z.flip(0), scale=scale)),
        torch.rand(3) + 1,
    ),
    "contrastive_lse-exclude_own": (
        lambda z: torch.cat(contrastive_lse(z, z, scale=2.0, exclude_own=True)),
        torch.randn(3, 6, 8),
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("function", "many"), CALLS.values(), ids=CALLS)
def test_vmap_is_one_call_after_another(function, many):
    """Values and gradients, whichever axis the calls lie on."""
    each = torch.stack([function(x) for x in many])
    torch.testing.assert_close(torch.vmap(function)(many), each)
    last = many.movedim(0, -1)
    torch.testing.assert_close(
        torch.vmap(function, in_dims=-1, out_dims=1)(last).movedim(1, 0), each
    )
    nested = torch.vmap(torch.vmap(function))(torch.stack([many, many]))
    torch.testing.assert_close(nested, torch.stack([each, each]))
    leaf = many.clone().requires_grad_()
    sum(function(x).square().sum() for x in leaf).backward()
    gradient = torch.func.grad(lambda x: function(x).square().sum())
    torch.testing.assert_close(torch.vmap(gradient)(many), leaf.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_blocks_beside_their_own_texts_give_the_same_numbers_everywhere(monkeypatch):
    """Eager backwards run a block again; compiled ones and those of torch.func do not."""
    monkeypatch.setattr(others, "BLOCK_TEXTS", 4)
    monkeypatch.setattr(others, "FEW_SCORES", 1)
    ran = []
    again = lambda *a, **k: ran.append(0) or checkpoint(*a, **k)  # noqa: E731
    monkeypatch.setattr(others, "checkpoint", again)

    def loss(z):
        row, col, pos = contrastive_lse(z, z, scale=2.0, exclude_own=True)
        return (row + 0.5 * col - pos).square().sum()

    def plain(z):
        scores = 2.0 * z @ z.T
        kept = scores.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        row, col = kept.logsumexp(1), kept.logsumexp(0)
        return (row + 0.5 * col - scores.diagonal()).square().sum()

    torch.manual_seed(2)
    z = torch.randn(10, 8) / 4
    expected = value_and_gradient(plain, z)
    torch.testing.assert_close(value_and_gradient(loss, z), expected)
    assert len(ran) == 3
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, z), expected)
    gradient, value = torch.func.grad_and_value(loss)(z)
    torch.testing.assert_close((value, gradient), expected)
    gradients, values = torch.vmap(torch.func.grad_and_value(loss))(torch.stack([z, z]))
    torch.testing.assert_close((values[1], gradients[1]), expected)
    assert len(ran) == 3


def value_and_gradient(function, x):
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_masks_and_indices():
    """What has no gradient may differ from call to call as well."""
    masks = torch.rand(3, 2, 5) < 0.7
    masked = lambda m: attention(Q, Q, Q, scale=0.3, key_mask=m)[0]  # noqa: E731
    torch.testing.assert_close(torch.vmap(masked)(masks), torch.stack([masked(m) for m in masks]))
    keeps = torch.tensor([[0, 1], [4, 2]])
    kept = torch.vmap(lambda keep: drop_token(TOKENS, keep))(keeps)
    torch.testing.assert_close(kept, torch.stack([TOKENS[:, keep] for keep in keeps]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", [op for op in CALLS if not op.endswith("exclude_own")])
def test_second_derivatives_are_refused_under_transforms(op):
    """Forward over reverse, which takes another way than reverse over reverse.

    A single block beside its own texts is plain torch, which has them.
    """
    function, many = CALLS[op]
    told = rf"^{op.partition('-')[0]}\w* has no .* for one, "
    for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        with pytest.raises(NotImplementedError, match=told):
            transform(lambda x: function(x).square().sum())(many[0])
