"""vatt_fast: VATT on replaceable kernels. Importing it touches no accelerator, no Triton and no JAX."""

from .config import PRESETS, TowerConfig, VATTConfig, preset
from .losses import VATTLoss, contrastive_terms, vatt_loss
from .model import VATT, VATTOutput, create_model

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "VATT",
    "TowerConfig",
    "VATTConfig",
    "VATTLoss",
    "VATTOutput",
    "contrastive_terms",
    "create_model",
    "preset",
    "vatt_loss",
]
