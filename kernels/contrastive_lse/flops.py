"""FLOPs of contrastive_lse: the one count that torch's counter, Pallas and the benchmarks read."""


def flops(mode: str, clips: int, texts: int, dim: int) -> int:
    """Of mode "fwd" or "bwd", for x (clips, dim) and y (texts, dim).

    Backward makes three products: the scores once more, d_x and d_y.
    """
    products = {"fwd": 1, "bwd": 3}[mode]
    return 2 * products * clips * texts * dim
