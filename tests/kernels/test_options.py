"""What other trainers need of the ops: causal attention, negatives alone, texts of nobody."""

import pytest
import torch
import torch.nn.functional as F

from vatt_fast.kernels import attention, contrastive_lse, use_backend
from vatt_fast.kernels.contrastive_lse import others
from vatt_fast.kernels.dispatch import choose, explain


def qkv(T=9, S=9):
    torch.manual_seed(0)
    return torch.randn(2, T, 3, 8), torch.randn(2, S, 3, 8), torch.randn(2, S, 3, 8)


def test_causal_attention_is_torchs():
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    own = explain("attention", q, k, v, scale=8**-0.5, causal=True)["native_cpu"]
    kernel = () if "not built" in own or "AVX2" in own else ("native_cpu",)
    for backend in ("plain", "reference", "torch_sdpa", *kernel):
        with use_backend(attention=backend):
            out, _ = attention(q, k, v, scale=8**-0.5, causal=True)
        torch.testing.assert_close(out, expected)


def test_causal_attention_goes_where_the_other_kind_goes():
    """Every kernel leaves out later keys, so what is the faster one stays it."""
    for T in (9, 300, 700):
        given = qkv(T, T)
        names = {choose("attention", "fwd", "", *given, scale=1.0, causal=c) for c in (True, False)}
        assert len(names) == 1, T


def test_causal_attention_wants_as_many_queries_as_keys():
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(*qkv(T=4), scale=1.0, causal=True)


def test_a_scale_of_one_element_has_a_gradient_of_one_element():
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    scale = torch.full((1,), 3.0, requires_grad=True)
    row, _, pos = contrastive_lse(x, y, scale=scale)
    (row - pos).sum().backward()
    one = torch.tensor(3.0, requires_grad=True)
    row, _, pos = contrastive_lse(x, y, scale=one)
    (row - pos).sum().backward()
    assert scale.grad.shape == (1,)
    torch.testing.assert_close(scale.grad[0], one.grad)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\)"):
        contrastive_lse(x, y, scale=torch.ones(2))


def test_negatives_stay_where_own_texts_outweigh_them():
    """exp(60) beside exp(0): taken away again in fp32, it would leave nothing of the others."""
    x = torch.eye(4)
    row, col, pos = contrastive_lse(x, x, scale=60.0, exclude_own=True)
    three = torch.full((4,), 3.0).log()
    torch.testing.assert_close(row, three)
    torch.testing.assert_close(col, three)
    torch.testing.assert_close(pos, torch.full((4,), 60.0))


def test_blocks_computed_again_have_the_same_gradients(monkeypatch):
    def gradients():
        torch.manual_seed(0)
        x, y = (F.normalize(torch.randn(600, 8), dim=1).requires_grad_() for _ in range(2))
        row, col, pos = contrastive_lse(x, y, scale=9.0, exclude_own=True)
        (row.square().sum() + col.square().sum() - pos.sum()).backward()
        return x.grad, y.grad

    kept = gradients()
    monkeypatch.setattr(others, "FEW_SCORES", 0)
    torch.testing.assert_close(gradients(), kept)


def test_texts_of_nobody_must_be_said():
    x, y = torch.randn(3, 8), torch.randn(8, 8)
    with pytest.raises(ValueError, match="multiple of texts_per_clip = 2"):
        contrastive_lse(x, y[:7], scale=1.0, texts_per_clip=2)
    _, col, _ = contrastive_lse(x, y, scale=1.0, texts_per_clip=2, extra_texts=2)
    assert col.shape == (8,)
    with pytest.raises(ValueError, match="extra_texts = 3"):
        contrastive_lse(x, y, scale=1.0, texts_per_clip=2, extra_texts=3)
