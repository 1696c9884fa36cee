"""FLOPs of patch_embed: the one count that torch's counter, Pallas and the benchmarks read."""


def flops(
    mode: str, batch: int, rows: int, values: int, dim: int, *, d_patches: bool = False
) -> int:
    """Of mode "fwd" or "bwd", for ``rows`` kept patches a clip.

    Backward makes one product for d_weight, and one for d_patches where that is asked for.
    """
    products = {"fwd": 1, "bwd": 1 + d_patches}[mode]
    return 2 * products * batch * rows * values * dim
