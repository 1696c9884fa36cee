"""Other code that an op is measured against.

A peer builds, for a case, a function with the op's own arguments, or says why it is absent. The
function returns what ``calls.compared`` lists (attention without lse). Plain torch (the op's
``plain.py``), eager and compiled for the exact shape; torch's fused attention, each kernel by
itself; other libraries where they can be imported. Another loss that a user would pick instead is
a peer too, marked as not ``alike``: its time can be compared, its values cannot.

A result line depends on its peer's row in ``PEERS`` and on what that names (``digest.py``).
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from vatt_fast.kernels.attention import plain as plain_attention
from vatt_fast.kernels.cases import Case
from vatt_fast.kernels.contrastive_lse import plain as plain_contrastive
from vatt_fast.kernels.drop_token import plain as plain_drop_token
from vatt_fast.kernels.patch_embed import plain as plain_patch_embed

Function = Callable[..., tuple[Tensor, ...]]
Build = Callable[[Any, torch.device], Function | str]

# B batch, T queries, S keys, H heads, K kept, M clips of x, P texts a clip


class Peer(NamedTuple):
    build: Build
    package: str | None = None  # a library's; None: torch itself
    alike: bool = True  # False: another loss in the same role: timed, its values not compared


def peers(op: str, names: Sequence[str] | None = None) -> dict[str, Peer]:
    """The peers of an op by name, or those named.

    Raises:
        ValueError: an unknown name.
    """
    known = PEERS[op]
    if unknown := sorted({*(names or ())} - {*known}):
        raise ValueError(f"unknown peers {', '.join(unknown)}; {op} has {', '.join(known)}")
    return {name: known[name] for name in (known if names is None else names)}


def compile_exactly(function: Function, **options) -> Function:
    """torch.compile for one shape; its backward may run more than once, as the bwd mode asks."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, **options)


def _torch(
    function: Function,
    *,
    compiled: bool = False,
    unless: Callable[[Any], str | None] = lambda case: None,
    alike: bool = True,
) -> Peer:
    """A function of torch, eager or compiled; ``unless`` says why a case is not for it."""

    def build(case: Case, device: torch.device) -> Function | str:
        return unless(case) or (compile_exactly(function) if compiled else function)

    return Peer(build, alike=alike)


def _plain(function: Callable) -> Function:
    """Plain torch with its outputs as a tuple."""

    def run(*args, **options):
        outputs = function(*args, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(each for each in outputs if each is not None)

    return run


# -- attention --------------------------------------------------------------------------------


def matmul_softmax(q, k, v, *, scale, bias=None, key_mask=None) -> tuple[Tensor, ...]:
    """The softmax written out, by a user who needs no log-sums: the yardstick computes them too."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return (torch.einsum("bhts,bshd->bthd", torch.softmax(scores, -1), v),)


def sdpa(*args, **options) -> tuple[Tensor, ...]:
    return plain_attention.attention(*args, **options)[:1]


def _sdpa_by(backend: SDPBackend, *devices: str) -> Build:
    def build(case: Case, device: torch.device) -> Function | str:
        if device.type not in devices:
            return f"that kernel exists on {', '.join(devices)}, not on {device.type}"

        def run(*args, **options):
            with sdpa_kernel(backend):
                return sdpa(*args, **options)

        return run

    return build


def flex(q, k, v, *, scale, bias=None, key_mask=None):
    def score_mod(score, b, h, t, s):
        if bias is not None:
            score = score + bias[h, t, s]
        return score if key_mask is None else torch.where(key_mask[b, s], score, float("-inf"))

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    modified = None if bias is None and key_mask is None else score_mod
    return (flex_attention(q, k, v, score_mod=modified, scale=scale).transpose(1, 2),)


def _flash_attn(package: str, module: str) -> Build:
    def build(case: Any, device: torch.device) -> Function | str:
        if device.type != "cuda":
            return f"{package} runs on CUDA"
        if case.bias or case.num_keys is not None:
            return f"{package} takes no bias and no mask"
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError) as error:
            return f"{package} cannot be imported: {error}"

        def run(q, k, v, *, scale, bias=None, key_mask=None):
            out = function(q, k, v, softmax_scale=scale)
            return (out[0] if isinstance(out, tuple) else out,)

        return run

    return build


# -- patch_embed ------------------------------------------------------------------------------


def project_then_drop(
    patches,
    weight,
    bias,
    position=None,
    keep=None,
    *,
    scale,
    shift,
    agg=None,
    patch=None,
    gathered=False,
) -> tuple[Tensor, ...]:
    """All patches, then DropToken, in the paper's order."""
    tokens = plain_patch_embed.patch_embed(
        patches, weight, bias, position, None, scale=scale, shift=shift, patch=patch
    )
    tokens = plain_drop_token.drop_token(tokens, keep)
    if agg is not None:
        tokens = torch.cat((agg.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), 1)
    return (tokens,)


def _nothing_dropped(case: Any) -> str | None:
    if case.kept is None or case.gathered:
        return "no row is to be dropped: it is gather_first"
    return None


# -- contrastive_lse --------------------------------------------------------------------------

materialised = plain_contrastive.contrastive_lse
_CHUNK = 1024  # rows of x at a time


def chunked(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> tuple[Tensor, ...]:
    """Materialised by chunks of rows, each computed again for its gradient."""
    parts = []
    for part in _chunks(x):
        valid = None if x_valid is None else x_valid[part]
        function = functools.partial(
            materialised,
            scale=scale,
            texts_per_clip=texts_per_clip,
            first=first + part.start,
            x_valid=valid,
            y_valid=y_valid,
        )
        parts.append(_recomputed(function, x[part], y))
    rows, cols, own = zip(*parts, strict=True)
    return torch.cat(rows), torch.logsumexp(torch.stack(cols), 0), torch.cat(own)


def _chunks(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, x.shape[0], _CHUNK))


def _recomputed(function: Callable, *tensors: Tensor) -> Any:
    """Nothing is kept for the gradient but the inputs."""
    return torch.utils.checkpoint.checkpoint(
        function, *tensors, use_reentrant=False, preserve_rng_state=False
    )


def _one_chunk(case: Any) -> str | None:
    if case.batch <= _CHUNK:
        return f"{case.batch} rows are one chunk: it is materialised"
    return None


def _not_whole_pairs(package: str, case: Any) -> str | None:
    """Why a loss over a square of clips and texts, all of them there, cannot run a case."""
    masks = case.x_invalid or case.y_invalid
    if case.texts_per_clip == 1 and case.batch == case.clips and not masks:
        return None
    return f"{package} takes one text a clip, all clips on one device and no masks"


def _cut_cross_entropy(case: Any, device: torch.device) -> Function | str:
    if device.type != "cuda":
        return "cut-cross-entropy runs on CUDA"
    if reason := _not_whole_pairs("cut-cross-entropy", case):
        return reason
    try:
        from cut_cross_entropy import linear_cross_entropy
    except (ImportError, OSError) as error:
        return f"cut-cross-entropy cannot be imported: {error}"

    def run(x, y, *, scale, **_):
        target = torch.arange(x.shape[0], device=x.device)
        scaled = x * scale.to(x.dtype)
        pos = (scaled.float() * y.float()).sum(1)
        row = linear_cross_entropy(scaled, y, target, reduction="none") + pos
        col = linear_cross_entropy(y, scaled, target, reduction="none") + pos
        return row.float(), col.float(), pos

    return run


def open_clip_losses() -> Any | str:
    """open_clip's module of losses, or why there is none.

    Read from its file, which imports torch alone. The package around it imports torchvision, whose
    usual wheels are linked against CUDA and do not load beside a CPU build of torch. So
    ``pip install --no-deps open_clip_torch`` is enough, and torchvision better left out: one that
    does not load breaks transformers' models too.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return "open_clip_torch cannot be imported: it is not installed"
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        return f"open_clip_torch cannot be imported: {error}"
    return module


def _open_clip(case: Any, device: torch.device) -> Function | str:
    """ClipLoss: two matrices of logits, each by its own product.

    Its cross-entropies are their log-sums less the positive logits.
    """
    if reason := _not_whole_pairs("open_clip's ClipLoss", case):
        return reason
    if isinstance(losses := open_clip_losses(), str):
        return losses
    loss = losses.ClipLoss()

    def run(x, y, *, scale, **_):
        # fp32, as autocast runs a cross-entropy
        of_clips, of_texts = (logits.float() for logits in loss.get_logits(x, y, scale))
        return torch.logsumexp(of_clips, 1), torch.logsumexp(of_texts, 1), of_clips.diagonal()

    return run


SIGLIP_BIAS = -10.0  # where SigLIP's learned offset starts; held fixed, as the temperature is


def siglip(x, y, *, scale, first=0, **_) -> tuple[Tensor, ...]:
    """SigLIP's loss of every clip (arXiv 2303.15343), not divided by their number, in chunks.

    Every pair of a clip and a text is judged by itself, -log sigmoid(S) where they belong together
    and -log sigmoid(-S) elsewhere, S = scale * x @ y.T + bias, so no log-sum spans the matrix.
    open_clip's SigLipLoss splits it over devices, not within one, so it is written here.
    """
    if x.shape[0] <= _CHUNK:
        return (_siglip_rows(x, y, scale=scale, first=first),)
    parts = []
    for part in _chunks(x):
        rows = functools.partial(_siglip_rows, scale=scale, first=first + part.start)
        parts.append(_recomputed(rows, x[part], y))
    return (torch.cat(parts),)


def _siglip_rows(x, y, *, scale, first) -> Tensor:
    S = (x @ y.T).float() * scale + SIGLIP_BIAS
    own = S.gather(1, first + torch.arange(x.shape[0], device=x.device)[:, None])
    # -log sigmoid(s) = softplus(-s) = softplus(s) - s: no matrix of labels
    return F.softplus(S).sum(1) - own.squeeze(1)


def _no_siglip(case: Any) -> str | None:
    if case.texts_per_clip != 1 or case.x_invalid or case.y_invalid:
        return "SigLIP takes one text a clip and no masks"
    return None


# -- who they are -----------------------------------------------------------------------------

PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "eager": _torch(_plain(matmul_softmax)),
        "eager_compiled": _torch(_plain(matmul_softmax), compiled=True),
        "sdpa_flash": Peer(_sdpa_by(SDPBackend.FLASH_ATTENTION, "cpu", "cuda")),
        "sdpa_efficient": Peer(_sdpa_by(SDPBackend.EFFICIENT_ATTENTION, "cuda")),
        "sdpa_cudnn": Peer(_sdpa_by(SDPBackend.CUDNN_ATTENTION, "cuda")),
        "sdpa_math": Peer(_sdpa_by(SDPBackend.MATH, "cpu", "cuda")),
        "sdpa_compiled": _torch(sdpa, compiled=True),
        "flex_compiled": _torch(flex, compiled=True),
        "flash_attn": Peer(_flash_attn("flash-attn", "flash_attn"), "flash-attn"),
        "flash_attn_3": Peer(_flash_attn("flash-attn-3", "flash_attn_interface"), "flash-attn-3"),
    },
    "patch_embed": {
        "gather_first": _torch(_plain(plain_patch_embed.patch_embed)),
        "gather_first_compiled": _torch(_plain(plain_patch_embed.patch_embed), compiled=True),
        "project_then_drop": _torch(project_then_drop, unless=_nothing_dropped),
        "project_then_drop_compiled": _torch(
            project_then_drop, unless=_nothing_dropped, compiled=True
        ),
    },
    "drop_token": {
        "gather": _torch(_plain(plain_drop_token.drop_token)),
        "gather_compiled": _torch(_plain(plain_drop_token.drop_token), compiled=True),
    },
    "contrastive_lse": {
        "materialised": _torch(_plain(materialised)),
        "materialised_compiled": _torch(_plain(materialised), compiled=True),
        "chunked": _torch(chunked, unless=_one_chunk),
        "chunked_compiled": _torch(chunked, unless=_one_chunk, compiled=True),
        "cut_cross_entropy": Peer(_cut_cross_entropy, "cut-cross-entropy"),
        "open_clip": Peer(_open_clip, "open_clip_torch"),
        "siglip": _torch(siglip, unless=_no_siglip, alike=False),
        "siglip_compiled": _torch(siglip, unless=_no_siglip, compiled=True, alike=False),
    },
}
