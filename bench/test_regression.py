"""Has an op become slower on this machine?

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare --benchmark-compare-fail=median:20%       # later

Every op as it is chosen on this device, at the tiny preset's sizes and one larger, forward and
backward. It compares a machine with itself; ``python -m bench ops`` compares with others.
"""

import pytest
import torch

from vatt_fast.kernels.cases import make

from . import calls
from .machine import DTYPES

CASES = {
    "attention": ("video_tiny_drop50", "text_tiny"),
    "drop_token": ("video_tiny_drop50", "audio_tiny_drop50"),
    "contrastive_lse": ("vt_tiny", "va_bbs_one_device"),
    "patch_embed": ("video_tiny_drop50", "audio_tiny_drop50"),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in CASES.items() for name in names]
)
def test_speed(benchmark, op, name, mode, dtype):
    (case,) = calls.select(op, [name])
    inputs = make(case, DTYPES[dtype], DEVICE)
    call = calls.call(calls.on_backend(op, ""), op, inputs, mode)

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(device=str(DEVICE), threads=torch.get_num_threads())
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
