#!/bin/sh
# The ops as torch_tpu would run them, on a machine without a TPU: registration, shapes and autograd
# wiring on fake tensors, and the kernels compiled by its libtpu; nothing is executed. Not part of
# `make test`: torch_tpu loads itself at `import torch`, so it has an environment of its own (2 GB),
# made once, in VATT_FAST_CACHE or the user's cache folder. torch is pinned: a bare `torch` may
# bring gigabytes of CUDA.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${VATT_FAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vatt_fast}/torch_tpu
if [ ! -e "$venv/.complete" ]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --editable "$root" \
        torch==2.13.0 torch_tpu==0.2.0 jax==0.10.2 jaxlib==0.10.2 pytest
    touch "$venv/.complete"
fi
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$venv/bin/python" -c "
import datetime, importlib.metadata as metadata
names = ('torch', 'torch_tpu', 'jax', 'libtpu')
print(datetime.date.today(), *(f'{name} {metadata.version(name)}' for name in names))"
cd "$root/tests/torch_tpu"
exec "$venv/bin/python" -m pytest -q -rs --disable-warnings --confcutdir=. check_torch_tpu.py "$@"
