"""What the kernels of patch_embed read."""

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def refused(patches, weight, bias, position, agg) -> str | None:
    """Why a kernel of fp32, fp16 and bf16, with patches also raw bytes, does not take these tensors."""
    for name, x in dict(
        patches=patches, weight=weight, bias=bias, position=position, agg=agg
    ).items():
        if (
            x is not None
            and x.dtype not in FLOATS
            and not (x is patches and x.dtype == torch.uint8)
        ):
            return f"{name} is {x.dtype}; it takes float32, float16 and bfloat16{', and uint8' if x is patches else ''}"
    return None
