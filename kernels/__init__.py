"""The four ops that carry VATT's cost, usable alone in any trainer.

The names below are functions; the folders of the same name hold their contracts, references and kernels.
"""

if __name__ == "kernels":  # transformers tries to import a package of this name, and finds this folder where it is on the path
    raise ImportError(
        "this folder is the source of vatt_fast.kernels, not the package 'kernels': import vatt_fast.kernels, or run elsewhere"
    )

from .attention import attention
from .dispatch import explain, use_backend
from .drop_token import drop_token, sample_keep
from .nce import contrastive_lse
from .patch_embed import patch_embed, patchify, unpatchify

__all__ = ["attention", "contrastive_lse", "drop_token", "explain", "patch_embed", "patchify", "sample_keep", "unpatchify", "use_backend"]
