"""Attention; the contract stands in op.py."""

from .op import attention

__all__ = ["attention"]
