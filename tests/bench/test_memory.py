"""What the ops allocate, in bytes: the same on every run, and no time is asserted anywhere."""

import pytest
import torch

from bench import calls
from bench.timer import peak_bytes
from vatt_fast.kernels.cases import AttentionCase, NCECase, PatchEmbedCase, make
from vatt_fast.kernels.contrastive_lse.native_cpu import KEPT_BYTES

CPU = torch.device("cpu")


def peak(case, op, mode="fwd+bwd"):
    call = calls.call(calls.on_backend(op, ""), op, make(case, torch.float32), mode)
    call()
    return peak_bytes(call, CPU)


def test_attention_grows_with_tokens_not_with_scores():
    short, long = (
        AttentionCase("", 1, tokens, tokens, 4, 64, packed=True) for tokens in (600, 1200)
    )
    assert peak(long, "attention") < 2.5 * peak(short, "attention")
    operand = 1200 * 4 * 64 * 4  # one of q, k, v, out; the scores are 18.75 of them
    assert peak(long, "attention", "fwd") < 2.2 * operand
    assert peak(long, "attention") < 6.5 * operand


def test_contrastive_sums_hold_the_matrix_for_the_backward_up_to_their_bound():
    few, many = (NCECase("", size, size, 1, 32, bound=True) for size in (3000, 9000))
    chunk = 0.3 * 3000 * 3000 * 4
    assert 9000 * 9000 * 4 > KEPT_BYTES > 3000 * 3000 * 4
    assert peak(few, "contrastive_lse", "fwd") < chunk  # nobody asks for a gradient
    assert peak(few, "contrastive_lse") < 2 * 3000 * 3100 * 4 + chunk  # scores, and weights of them
    assert peak(many, "contrastive_lse") < 0.3 * 9000 * 9000 * 4


@pytest.mark.parametrize("kept", [None, 392])
def test_patches_are_converted_only_where_they_are_kept(kept):
    case = PatchEmbedCase("", 1, 1568, 3072, 64, kept=kept)
    rows = kept or 1568
    assert peak(case, "patch_embed") < 2.05 * rows * (3072 + 2 * 64) * 4  # as floats, and scaled
