"""vatt_fast: VATT on replaceable kernels. Importing it touches no accelerator, no Triton, no JAX."""

from pathlib import Path

# In a checkout, kernels/ lies beside this folder, not inside it. Python that runs in the checkout's
# root imports this folder, also after a plain install elsewhere. So look for kernels/ there.
if (
    not (Path(__file__).parent / "kernels").exists()
    and (Path(__file__).parents[1] / "kernels" / "contrastive_lse").is_dir()
):
    __path__.append(str(Path(__file__).parents[1]))

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
