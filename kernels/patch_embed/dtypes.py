"""What the kernels of patch_embed read."""

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_dtypes(patches, weight, bias, position, agg) -> str | None:
    """The reason why a kernel of fp32, fp16 and bf16 cannot take these tensors.

    Patches may also be raw bytes.
    """
    operands = dict(patches=patches, weight=weight, bias=bias, position=position, agg=agg)
    for name, x in operands.items():
        taken = (*FLOATS, torch.uint8) if x is patches else FLOATS
        if x is not None and x.dtype not in taken:
            bytes_too = ", and uint8" if x is patches else ""
            return f"{name} is {x.dtype}; it takes float32, float16 and bfloat16{bytes_too}"
    return None
