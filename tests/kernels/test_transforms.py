"""The ops under torch's transforms and copies: they work, or are refused in one sentence."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vatt_fast.kernels import attention, contrastive_lse, drop_token, patch_embed


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


def test_vmap_works():
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 2, 8)

    def out(q):
        return attention(q, q, q, scale=8**-0.5)[0]

    torch.testing.assert_close(torch.vmap(out)(q), torch.stack([out(each) for each in q]))
