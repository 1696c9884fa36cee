"""The verbs that say what a machine offers and what the paper counts: doctor, flops."""

import importlib.metadata
import importlib.util
import platform
import textwrap
from json import dumps  # ``json`` is an option of the verbs
from typing import Any

import torch

from .. import __version__
from ..devices import pick_device
from ..kernels import explain, native
from ..kernels.cases import make
from ..kernels.dispatch import native_bf16
from ..kernels.ops import OPS
from ..kernels.settings import requested
from ..paper_tables import flops_table, format_tables, input_table, parameter_table

_WIDTH = 100
# what ``doctor`` asks about: a training step of base_base_small
_DOCTOR_CASES = {
    "attention": "video_bbs_drop50",
    "drop_token": "video_bbs_drop50",
    "contrastive_lse": "va_bbs",
    "patch_embed": "video_bbs_drop50",
}


def doctor(json: bool = False) -> None:
    """Say what this machine offers: versions, device, codecs, and which backend runs each op.

    Args:
        json: print JSON.
    """
    device = pick_device("auto")
    report: dict[str, Any] = {
        "vatt_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    names = "triton jax optax libtpu av tyro tensorboard scikit-learn matplotlib google-crc32c"
    report |= {name: _version(name) for name in names.split()}
    threads = f"cpu, {torch.get_num_threads()} threads"
    report["device"] = torch.cuda.get_device_name() if device.type == "cuda" else threads
    report["native bf16"] = native_bf16(device)
    if importlib.util.find_spec("av"):
        import av

        encoders = [name for name in ("libx264", "mpeg4", "aac") if name in av.codecs_available]
        report["encoders"] = ", ".join(encoders)
    report["C++ kernels"] = native.explain()
    dtype = torch.bfloat16 if native_bf16(device) else torch.float32
    report["backends"] = {op: _verdicts(op, dtype, device) for op in OPS}
    report["requested"] = {op: requested(op) for op in OPS if requested(op)} or "automatic"
    report["note"] = (
        "recipe 'released' trains with attention dropout, which is torch's own attention whatever "
        "the backend"
    )
    if json:
        print(dumps(report))
        return
    verdicts = report.pop("backends")
    for name, value in report.items():
        print(textwrap.fill(f"{name}: {value}", _WIDTH, subsequent_indent="    "))
    for op, by_backend in verdicts.items():
        print(f"\n{op} on the case {_DOCTOR_CASES[op]} in {str(dtype).removeprefix('torch.')}:")
        for backend, verdict in by_backend.items():
            print(_row(backend, verdict))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verdicts(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What each backend says to a call of real size."""
    options = make(OPS[op].cases[_DOCTOR_CASES[op]], dtype, device)
    tensors = [options.pop(name) for name in OPS[op].tensors]
    return explain(op, *tensors, **options)


def _row(name: str, text: str) -> str:
    """``name`` and ``text`` in two columns, the text wrapped."""
    first, following = f"  {name:<14}", " " * 16
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=following)


def flops(json: bool = False) -> None:
    """Print the paper's GFLOPs beside its convention and the true counts, and parameter counts.

    Also those of other clip and patch sizes, and of spectrograms.

    Args:
        json: print JSON.
    """
    if json:
        tables = dict(flops=flops_table(), inputs=input_table(), parameters=parameter_table())
        print(dumps(tables, indent=2))
    else:
        print(format_tables())
