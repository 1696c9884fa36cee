"""DropToken; the contract stands in op.py, the draw in keep.py."""

from .keep import check_keep, num_kept, sample_keep
from .op import drop_token

__all__ = ["check_keep", "drop_token", "num_kept", "sample_keep"]
