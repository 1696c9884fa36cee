"""Raw patches to tokens; the contract stands in op.py."""

from .op import patch_embed
from .patchify import patchify, unpatchify

__all__ = ["patch_embed", "patchify", "unpatchify"]
