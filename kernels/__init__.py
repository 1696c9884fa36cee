"""The four ops that carry VATT's cost, usable alone in any trainer.

The names below are functions. The folders of the same name hold their contracts, references and
kernels.
"""

# transformers looks for another package of this name, and finds this folder where the repository's
# root is on the path
if __name__ == "kernels":

    def __getattr__(name: str):
        raise AttributeError(
            "this folder is the source of vatt_fast.kernels, not a package 'kernels' that has"
            f" {name}: import vatt_fast.kernels"
        )

else:
    from .attention import attention
    from .contrastive_lse import contrastive_lse
    from .dispatch import explain
    from .drop_token import drop_token, sample_keep
    from .patch_embed import patch_embed, patchify, unpatchify
    from .registration import operator
    from .settings import use_backend

    # for torch.utils.checkpoint.create_selective_checkpoint_contexts, which computes any op it is
    # not told of again: these take long to compute, and little memory to keep
    SAVE_OPS = [operator("attention"), operator("contrastive_lse")]

__all__ = [
    "SAVE_OPS",
    "attention",
    "contrastive_lse",
    "drop_token",
    "explain",
    "patch_embed",
    "patchify",
    "sample_keep",
    "unpatchify",
    "use_backend",
]
