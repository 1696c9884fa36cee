"""How often Triton compiles a kernel: once, whatever the batch, the ranks and the slices."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels import triton, which is not installed")

# Launches only ask what would be compiled, with a driver of a device that is not there.
ASKED = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from vatt_fast.kernels.contrastive_lse import triton_gpu as contrastive_lse
from vatt_fast.kernels.drop_token import triton_gpu as drop_token
from vatt_fast.kernels.patch_embed import triton_gpu as patch_embed
from vatt_fast.kernels.settings import force_tiles

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def do_compile(self, key, *args):
    asked.setdefault(self.fn.__name__, set()).add(key)

asked, run = {}, JITFunction.run
JITFunction._do_compile = do_compile
JITFunction.run = lambda self, *args, **kwargs: run(self, *args, **kwargs | {"warmup": True})
triton.runtime.driver.set_active(Driver())

def slice_of(*shape, dtype):
    # at an odd address
    size = torch.Size(shape).numel()
    return torch.ones(size + 1, dtype=dtype)[1:].view(shape)

def contrastive(M, N, P, first, bound):
    x, y = torch.ones(M, 64, dtype=torch.half), torch.ones(N * P, 64, dtype=torch.half)
    options = dict(scale=torch.ones(()), texts_per_clip=P, first=first, bound=bound)
    options |= dict(x_valid=slice_of(M, dtype=torch.bool), y_valid=torch.ones(N * P).bool())
    row, col, pos = contrastive_lse.forward(x, y, **options)
    contrastive_lse.backward(row, slice_of(N * P, dtype=torch.float32), pos, x, y, row, col, pos,
                             **options)

def patches(B, N, K, per, clip=None, patch=None):
    given = (B, *clip) if clip else (B, N, 768)
    keep = slice_of(*((B, K) if per == "clip" else (K,)), dtype=torch.int32)
    options = dict(position=torch.ones(N, 128), keep=keep, agg=torch.ones(128), patch=patch)
    options |= dict(scale=0.5, shift=0.25, dtype=torch.half)
    tensors = (torch.ones(given, dtype=torch.uint8), torch.ones(128, 768), torch.ones(128))
    tokens = patch_embed.forward(*tensors, **options)
    patch_embed.backward(tokens, *tensors, **options)

def tokens(B, N, K, per):
    keep = slice_of(*((B, K) if per == "clip" else (K,)), dtype=torch.int32)
    drop_token.backward(drop_token.forward(torch.ones(B, N, 64), keep), keep, N)

tiles = dict(num_warps=4, num_stages=2)
nce = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_D=64, **tiles)
fused = dict(PACKED=0, FOLD=0, BLOCK_ROWS=16, BLOCK_DIM=64, BLOCK_VALUES=64, **tiles)
weight = dict(PACKED=0, CHUNKS=1, BLOCK_ROWS=16, BLOCK_DIM=64, BLOCK_VALUES=64, **tiles)
sums = dict(BLOCK_ROWS=4, BLOCK_DIM=128, num_warps=4)
with force_tiles(contrastive_lse_forward=nce, contrastive_lse_weights=nce,
                 patch_embed_forward=fused, patch_embed_weight=weight, patch_embed_sums=sums):
    counts = []
    for call in json.loads(sys.argv[1]):
        globals()[call[0]](*call[1:])
        counts.append({name: len(keys) for name, keys in asked.items()})
print(json.dumps(counts))
"""


CLIPS_AND_TEXTS = ((16, 48, 1, 0), (15, 47, 3, 16), (1, 1, 1, 0), (3, 33, 16, 30))
CLIPS_AND_PATCHES = ((2, 64, 32), (3, 65, 33), (2, 17, 1))


@pytest.mark.parametrize(
    "calls",
    [
        *([["contrastive", *each, bound] for each in CLIPS_AND_TEXTS] for bound in (15.0, None)),
        *([["tokens", *each, per] for each in CLIPS_AND_PATCHES] for per in ("clip", "batch")),
        *([["patches", *each, per] for each in CLIPS_AND_PATCHES] for per in ("clip", "batch")),
        [
            ["patches", 2, t * h * w, kept, "batch", [4 * t, 8 * h, 8 * w, 3], [4, 8, 8]]
            for t, h, w, kept in ((4, 4, 4, 32), (1, 3, 6, 7), (2, 1, 2, 1))
        ],
    ],
    ids=["bounded", "running", "tokens_per_clip", "tokens", "rows_per_clip", "rows", "clip"],
)
def test_another_size_compiles_nothing(calls):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ASKED, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout)
    assert first and all(other == first for other in others), others
