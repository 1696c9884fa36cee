"""DropToken on tokens as one reads it: a gather and its scatter."""

import torch

from ..numerics import put_rows, take_rows

# B batch, N tokens, K kept


def forward(tokens, keep, *, xp=torch):
    return take_rows(xp, tokens, keep)


def backward(d_kept, keep, num_tokens, *, xp=torch):
    return put_rows(xp, d_kept, keep, num_tokens)


def unsupported(tokens, keep) -> str | None:
    return None
