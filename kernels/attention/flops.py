"""FLOPs of attention: the one count that torch's counter, Pallas and the benchmarks read."""


def flops(mode: str, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Of mode "fwd" or "bwd". Backward makes five products, one of them the scores once more.

    Causal calls count as whole ones, as torch's own counter has them.
    """
    products = {"fwd": 2, "bwd": 5}[mode]
    return 2 * products * batch * heads * queries * keys * head_dim
