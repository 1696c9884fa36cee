#!/bin/sh
# The torch ops and training steps through torch_xla on its CPU device, kernels interpreted; then
# the kernels compiled for a TPU by the libtpu of torch_xla's pins. Not part of `make test`: the
# environment takes 8 GB and ten minutes; it is made once, in VATT_FAST_CACHE or the
# user's cache folder.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${VATT_FAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vatt_fast}/xla
if [ ! -e "$venv/.complete" ]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --editable "$root[xla]" pytest
    touch "$venv/.complete"
fi
"$venv/bin/python" -c "
import datetime, importlib.metadata as metadata
names = ('torch', 'torch_xla', 'jax', 'libtpu')
print(datetime.date.today(), *(f'{name} {metadata.version(name)}' for name in names))"
export PJRT_DEVICE=CPU JAX_PLATFORMS=cpu
export TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost  # no TPU here to ask
cd "$root/tests/xla"
exec "$venv/bin/python" -m pytest -q -rs --confcutdir=. check_torch_xla.py "$@"
