"""What the ops allocate, in bytes: the same on every run, and no time is asserted anywhere."""

import pytest
import torch

from bench import calls
from bench.timer import peak_bytes
from vatt_fast.kernels.cases import AttentionCase, NCECase, PatchEmbedCase, make

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


def test_contrastive_sums_never_hold_the_matrix():
    case = NCECase("", 3000, 3000, 1, 32, bound=True)
    assert peak(case, "contrastive_lse") < 0.3 * 3000 * 3000 * 4


@pytest.mark.parametrize("kept", [None, 392])
def test_patches_are_converted_only_where_they_are_kept(kept):
    case = PatchEmbedCase("", 1, 1568, 3072, 64, kept=kept)
    rows = kept or 1568
    assert peak(case, "patch_embed") < 2.05 * rows * (3072 + 2 * 64) * 4  # as floats, and scaled
