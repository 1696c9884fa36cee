"""The contrastive log-sums; the contract stands in op.py."""

from .op import contrastive_lse

__all__ = ["contrastive_lse"]
