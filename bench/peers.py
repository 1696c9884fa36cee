"""Whom the ops are measured against: each peer builds, for a case, a function with the op's own arguments, or says why it is absent.

A peer returns what ``op_calls.COMPARED`` lists (attention without lse). Plain torch, eager and compiled; torch's fused attention, each kernel by
itself; and other libraries where they are importable. Compiled peers are compiled for the exact shape. Another loss that a user would pick
instead is a peer too, marked as not ``alike``: its time can be compared, its values cannot.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vatt_fast.kernels import patchify
from vatt_fast.kernels.cases import Case
from vatt_fast.kernels.dispatch import autocast_dtype

Function = Callable[..., tuple[Tensor, ...]]

# B batch, T queries, S keys, H heads, K kept, M clips of x, P texts a clip


class Peer(NamedTuple):
    op: str
    name: str
    build: Callable[[Case, torch.device], Function | str]
    package: str | None = None  # a library's; None: torch itself
    compiled: bool = False
    alike: bool = True  # False: another loss in the same role, whatever tensors it returns: timed, its error not taken


_PEERS: list[Peer] = []


def peer(
    op: str, name: str, *, package: str | None = None, compiled: bool = False, alike: bool = True
):
    """Register ``build(case, device)``; adding a peer is one decorated function."""

    def register(build):
        _PEERS.append(Peer(op, name, build, package, compiled, alike))
        return build

    return register


def peers(op: str, names: tuple[str, ...] | None = None) -> list[Peer]:
    """The registered peers of an op, or those named.

    Raises:
        ValueError: an unknown name.
    """
    known = {each.name: each for each in _PEERS if each.op == op}
    if names is None:
        return list(known.values())
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown peers {', '.join(unknown)}; {op} has {', '.join(known)}")
    return [known[name] for name in names]


def compile_exactly(function: Function, **options) -> Function:
    """torch.compile for one shape; its backward may run more than once, as the bwd mode asks."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, **options)


def _plain(op: str, name: str, function: Function) -> None:
    """Register a function eager and compiled."""
    peer(op, name)(lambda case, device: function)
    peer(op, f"{name}_compiled", compiled=True)(lambda case, device: compile_exactly(function))


# -- attention ---------------------------------------------------------------------------------------------------------


def additive_mask(q: Tensor, bias: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """(1 or B, H or 1, T or 1, S) in q's dtype, as SDPA takes it."""
    mask = None if bias is None else bias[None].to(q.dtype)
    if key_mask is None:
        return mask
    hidden = ~key_mask[:, None, None, :]
    zero = q.new_zeros((1, 1, 1, 1)) if mask is None else mask
    return zero.masked_fill(hidden, float("-inf"))


def matmul_softmax(q, k, v, *, scale, bias=None, key_mask=None) -> tuple[Tensor, ...]:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    mask = additive_mask(q, bias, key_mask)
    if mask is not None:
        scores = scores + mask
    return (torch.einsum("bhts,bshd->bthd", torch.softmax(scores, -1), v),)


def sdpa(q, k, v, *, scale, bias=None, key_mask=None, **_) -> tuple[Tensor, ...]:
    mask = additive_mask(q, bias, key_mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2),)


_plain("attention", "eager", matmul_softmax)


def _sdpa_peer(name: str, backend: Any, devices: tuple[str, ...]) -> None:
    def build(case: Case, device: torch.device) -> Function | str:
        if device.type not in devices:
            return f"that kernel exists on {', '.join(devices)}, not on {device.type}"

        def run(*args, **options):
            with sdpa_kernel(backend):
                return sdpa(*args, **options)

        return run

    peer("attention", name)(build)


_sdpa_peer("sdpa_flash", SDPBackend.FLASH_ATTENTION, ("cpu", "cuda"))
_sdpa_peer("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION, ("cuda",))
_sdpa_peer("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION, ("cuda",))
_sdpa_peer("sdpa_math", SDPBackend.MATH, ("cpu", "cuda"))


@peer("attention", "sdpa_compiled", compiled=True)
def _(case, device):
    return compile_exactly(sdpa)


@peer("attention", "flex_compiled", compiled=True)
def _(case, device):
    from torch.nn.attention.flex_attention import flex_attention

    def run(q, k, v, *, scale, bias=None, key_mask=None):
        def score_mod(score, b, h, t, s):
            if bias is not None:
                score = score + bias[h, t, s]
            return score if key_mask is None else torch.where(key_mask[b, s], score, float("-inf"))

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        plain = bias is None and key_mask is None
        return (
            flex_attention(q, k, v, score_mod=None if plain else score_mod, scale=scale).transpose(
                1, 2
            ),
        )

    return compile_exactly(run)


def _flash_attn(package: str, module: str):
    def build(case, device):
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


peer("attention", "flash_attn", package="flash-attn")(_flash_attn("flash-attn", "flash_attn"))
peer("attention", "flash_attn_3", package="flash-attn-3")(
    _flash_attn("flash-attn-3", "flash_attn_interface")
)


# -- patch_embed -------------------------------------------------------------------------------------------------------


def take(x: Tensor, keep: Tensor | None) -> Tensor:
    """Kept rows of x (B, N, D)."""
    if keep is None:
        return x
    if keep.ndim == 1:
        return x.index_select(1, keep)
    return x.gather(1, keep.long()[..., None].expand(-1, -1, x.shape[2]))


def gather_first(
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
    """Kept rows only: gather, normalise, linear, add."""
    if patch is not None:
        patches = patchify(patches, tuple(patch))
    rows = patches if gathered else take(patches, keep)
    return _finish(_project(rows, weight, bias, scale, shift), position, keep, agg)


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
    if patch is not None:
        patches = patchify(patches, tuple(patch))
    tokens = _project(patches, weight, bias, scale, shift)
    return _finish(tokens if gathered else take(tokens, keep), position, keep, agg)


def _project(rows, weight, bias, scale, shift) -> Tensor:
    dtype = (
        autocast_dtype(rows.device) or weight.dtype
    )  # raw values straight to the dtype of the product: half the traffic of fp32
    return F.linear(rows.to(dtype) * scale + shift, weight, bias)


def _finish(tokens, position, keep, agg) -> tuple[Tensor, ...]:
    if position is not None:
        tokens = tokens + (position if keep is None else position[keep.long()]).to(tokens.dtype)
    if agg is not None:
        tokens = torch.cat((agg.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), 1)
    return (tokens,)


_plain("patch_embed", "gather_first", gather_first)


def _only_where_dropped(function: Function, compiled: bool):
    def build(case, device):
        if case.kept is None:
            return "nothing is dropped: it is gather_first"
        return compile_exactly(function) if compiled else function

    return build


peer("patch_embed", "project_then_drop")(_only_where_dropped(project_then_drop, False))
peer("patch_embed", "project_then_drop_compiled", compiled=True)(
    _only_where_dropped(project_then_drop, True)
)


# -- drop_token --------------------------------------------------------------------------------------------------------


def index_or_gather(tokens, keep) -> tuple[Tensor, ...]:
    return (take(tokens, keep),)


_plain("drop_token", "gather", index_or_gather)


# -- contrastive_lse ---------------------------------------------------------------------------------------------------------------


def materialised(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> tuple[Tensor, ...]:
    """The whole matrix in fp32 after a product in the inputs' dtype."""
    S = (x @ y.T).float() * scale
    if y_valid is not None:
        S = S.masked_fill(~y_valid, float("-inf"))
    cols = S if x_valid is None else S.masked_fill(~x_valid[:, None], float("-inf"))
    M, P = x.shape[0], texts_per_clip
    mine = first * P + torch.arange(M * P, device=x.device).view(M, P)
    return torch.logsumexp(S, 1), torch.logsumexp(cols, 0), torch.logsumexp(S.gather(1, mine), 1)


_plain("contrastive_lse", "materialised", materialised)
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


def _only_in_chunks(compiled: bool):
    def build(case, device):
        if case.batch <= _CHUNK:
            return f"{case.batch} rows are one chunk: it is materialised"
        return compile_exactly(chunked) if compiled else chunked

    return build


peer("contrastive_lse", "chunked")(_only_in_chunks(False))
peer("contrastive_lse", "chunked_compiled", compiled=True)(_only_in_chunks(True))


def _only_whole_pairs(package: str, case: Any) -> str | None:
    """Why a loss over a square of clips and texts, all of them there, cannot run a case."""
    whole = (
        case.texts_per_clip == 1
        and case.batch == case.clips
        and not case.x_invalid
        and not case.y_invalid
    )
    return (
        None if whole else f"{package} takes one text a clip, all clips on one device and no masks"
    )


@peer("contrastive_lse", "cut_cross_entropy", package="cut-cross-entropy")
def _(case, device):
    if device.type != "cuda":
        return "cut-cross-entropy runs on CUDA"
    if reason := _only_whole_pairs("cut-cross-entropy", case):
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

    Read from its file, which imports torch alone: the package around it imports torchvision, whose usual wheels are linked against CUDA and
    do not load beside a CPU build of torch. ``pip install --no-deps open_clip_torch`` is therefore enough, and torchvision better left out:
    one that does not load takes transformers' models with it.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return "open_clip_torch cannot be imported: it is not installed"
    spec = importlib.util.spec_from_file_location(
        "open_clip_losses", Path(package.submodule_search_locations[0]) / "loss.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        return f"open_clip_torch cannot be imported: {error}"
    return module


@peer("contrastive_lse", "open_clip", package="open_clip_torch")
def _(case, device):
    """ClipLoss: both matrices of logits, each by a product of its own. Its cross-entropies are their log-sums less the positive logits."""
    if reason := _only_whole_pairs("open_clip's ClipLoss", case):
        return reason
    if isinstance(losses := open_clip_losses(), str):
        return losses
    loss = losses.ClipLoss()

    def run(x, y, *, scale, **_):
        of_clips, of_texts = (
            logits.float() for logits in loss.get_logits(x, y, scale)
        )  # fp32, as autocast runs a cross-entropy
        return torch.logsumexp(of_clips, 1), torch.logsumexp(of_texts, 1), of_clips.diagonal()

    return run


SIGLIP_BIAS = -10.0  # where SigLIP's learned offset starts; held fixed, as the temperature is


def siglip(x, y, *, scale, first=0, **_) -> tuple[Tensor, ...]:
    """SigLIP's loss of every clip (arXiv 2303.15343), not divided by their number; by chunks of rows as ``chunked``.

    Every pair of a clip and a text is judged by itself, -log sigmoid(S) where they belong together and -log sigmoid(-S) elsewhere,
    S = scale * x @ y.T + bias, so no log-sum spans the matrix. open_clip's SigLipLoss splits it over devices, not within one: hence this.
    """
    if x.shape[0] <= _CHUNK:
        return (_siglip_rows(x, y, scale=scale, first=first),)
    parts = [
        _recomputed(
            functools.partial(_siglip_rows, scale=scale, first=first + part.start), x[part], y
        )
        for part in _chunks(x)
    ]
    return (torch.cat(parts),)


def _siglip_rows(x, y, *, scale, first) -> Tensor:
    S = (x @ y.T).float() * scale + SIGLIP_BIAS
    own = S.gather(1, first + torch.arange(x.shape[0], device=x.device)[:, None])
    return F.softplus(S).sum(1) - own.squeeze(
        1
    )  # -log sigmoid(s) = softplus(-s) = softplus(s) - s: no matrix of labels


def _siglip(compiled: bool):
    def build(case, device):
        if case.texts_per_clip != 1 or case.x_invalid or case.y_invalid:
            return "SigLIP takes one text a clip and no masks"
        return compile_exactly(siglip) if compiled else siglip

    return build


peer("contrastive_lse", "siglip", alike=False)(_siglip(False))
peer("contrastive_lse", "siglip_compiled", compiled=True, alike=False)(_siglip(True))
