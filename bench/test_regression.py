"""Has an op become slower? ``pytest bench --benchmark-autosave``, later ``pytest bench --benchmark-compare --benchmark-compare-fail=median:20%``.

Every op as it is chosen on this device, at the tiny preset's sizes and one larger, forward and backward. It compares a machine with
itself; ``bench.run`` compares with others.
"""

import pytest
import torch

from . import op_calls
from .machine import DTYPES
from .selection import select

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
    (case,) = select(op, [name])
    call = op_calls.call(
        op_calls.on_backend(op, ""), op, op_calls.make(case, DTYPES[dtype], DEVICE), mode
    )

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(device=str(DEVICE), threads=torch.get_num_threads())
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
