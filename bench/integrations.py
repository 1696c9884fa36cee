"""Our ops inside other libraries, held against the libraries' own paths; and peak memory of losses.

    python -m bench.integrations                 the errors, as a Markdown table
    python -m bench.integrations --memory 8192   peak memory of the losses at this batch

Models are small and of random weights. An error is ||ours - theirs|| / ||theirs||, of the output
and of all gradients as one vector. What bf16 itself costs the library stands beside it: its own
bf16 path against its fp32 path. Libraries that do not import are left out, with the reason.
"""

import argparse
import functools
import importlib
import importlib.util
import multiprocessing
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.without_torchvision import stand_in

_SEED = 0


class Result(NamedTuple):
    """One path's output and gradients."""

    value: Tensor
    gradient: Tensor


class Case(NamedTuple):
    """A library's path and ours, on the same weights and inputs."""

    library: str
    name: str
    run: Callable[[torch.dtype, bool], Result]  # (dtype, ours)


def relative(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm())


def errors(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Of ours against theirs in one dtype: (output, gradients)."""
    ours, theirs = case.run(dtype, True), case.run(dtype, False)
    return relative(ours.value, theirs.value), relative(ours.gradient, theirs.gradient)


def rounding(case: Case) -> tuple[float, float]:
    """Of the library's bf16 against its fp32: (output, gradients)."""
    half, full = case.run(torch.bfloat16, False), case.run(torch.float32, False)
    return relative(half.value, full.value), relative(half.gradient, full.gradient)


def missing(library: str) -> str | None:
    """Why the library cannot be used here, or None."""
    stand_in()
    try:
        importlib.import_module(library)
    except Exception as error:
        # a library that is there and breaks on what it needs tells more than ImportError
        return f"{library} does not import: {type(error).__name__}: {error}"
    return None


def _differentiated(output: Tensor, leaves: list[Tensor]) -> Result:
    # weighed at random: the sum of squares of what a layer norm gives is constant
    generator = torch.Generator().manual_seed(_SEED)
    (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
    gradients = [x.grad for x in leaves if x.grad is not None]
    return Result(output.detach(), torch.cat([g.float().flatten() for g in gradients]))


# -- transformers ------------------------------------------------------------------------------

_SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
)
_VISION = dict(**_SIZES, image_size=32, patch_size=8)
_TEXT = dict(
    **_SIZES,
    vocab_size=99,
    max_position_embeddings=12,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)


def _images(count: int = 2) -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(count, 3, 32, 32))


def _words(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (3, 12))
    if not padded:
        return dict(input_ids=ids)
    return dict(
        input_ids=ids, attention_mask=(torch.arange(12) < torch.tensor([[12], [8], [3]])) + 0
    )


def _sound(padded: bool) -> dict[str, Tensor]:
    given = dict(input_values=torch.randn(2, 2000))
    if padded:
        given["attention_mask"] = (torch.arange(2000) < torch.tensor([[2000], [1200]])) + 0
    return given


# name -> (model, configuration, its arguments, inputs, output)
_MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Tensor]], str]] = {
    "ViT": ("ViTModel", "ViTConfig", _VISION, _images, "last_hidden_state"),
    "VideoMAE": (
        "VideoMAEModel",
        "VideoMAEConfig",
        dict(**_VISION, num_frames=4),
        lambda: dict(pixel_values=torch.randn(2, 4, 3, 32, 32)),
        "last_hidden_state",
    ),
    "CLIP text, causal": (
        *("CLIPTextModel", "CLIPTextConfig", _TEXT),
        functools.partial(_words, False),
        "last_hidden_state",
    ),
    "CLIP text, causal, padded": (
        *("CLIPTextModel", "CLIPTextConfig", _TEXT),
        functools.partial(_words, True),
        "last_hidden_state",
    ),
    "CLIP": (
        "CLIPModel",
        "CLIPConfig",
        dict(text_config=_TEXT, vision_config=_VISION, projection_dim=32),
        lambda: _words(True) | _images(3),
        "logits_per_image",
    ),
    "SigLIP, padded": (
        "SiglipModel",
        "SiglipConfig",
        dict(text_config=_TEXT, vision_config=_VISION),
        lambda: _words(True) | _images(3),
        "logits_per_image",
    ),
    "AST": (
        "ASTModel",
        "ASTConfig",
        dict(
            **_SIZES,
            num_mel_bins=32,
            max_length=64,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
        ),
        lambda: dict(input_values=torch.randn(2, 64, 32)),
        "last_hidden_state",
    ),
    **{
        f"Wav2Vec2{', padded' * padded}": (
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            dict(
                **_SIZES,
                conv_dim=(32,) * 4,
                conv_stride=(5, 2, 2, 2),
                conv_kernel=(10, 3, 3, 3),
                num_feat_extract_layers=4,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
                apply_spec_augment=False,
            ),
            functools.partial(_sound, padded),
            "last_hidden_state",
        )
        for padded in (False, True)
    },
}


def _transformers(name: str, dtype: torch.dtype, ours: bool) -> Result:
    import transformers

    from vatt_fast.integrations import transformers as integration

    integration.register()
    model, config, arguments, inputs, output = _MODELS[name]
    torch.manual_seed(_SEED)
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    built.set_attn_implementation("vatt_fast" if ours else "sdpa")
    built = built.to(dtype).eval()  # no dropout; gradients all the same
    given = {each: x.to(dtype) if x.is_floating_point() else x for each, x in inputs().items()}
    return _differentiated(getattr(built(**given), output), list(built.parameters()))


# -- losses ------------------------------------------------------------------------------------


def _unit(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype).requires_grad_()


def _loss_of(loss: Callable[..., Tensor], leaves: list[Tensor]) -> Result:
    value = loss(*leaves)
    value.backward()
    gradients = [x.grad.float().flatten() for x in leaves if x.grad is not None]
    return Result(value.detach(), torch.cat(gradients))


def _open_clip(bias: bool, dtype: torch.dtype, ours: bool, rows: int = 97, dim: int = 32) -> Result:
    import open_clip

    from vatt_fast.integrations import open_clip as integration

    torch.manual_seed(_SEED)
    loss = (integration if ours else open_clip).ClipLoss()
    leaves = [_unit(rows, dim, dtype), _unit(rows, dim, dtype)]
    leaves.append(torch.tensor(14.0, dtype=dtype, requires_grad=True))
    if bias:
        leaves.append(torch.tensor(-3.0, dtype=dtype, requires_grad=True))
    return _loss_of(loss, leaves)


def _lightly(
    temperature: float, bank: int, dtype: torch.dtype, ours: bool, rows: int = 300, dim: int = 32
) -> Result:
    from lightly.loss import ntx_ent_loss

    from vatt_fast.integrations import lightly as integration

    torch.manual_seed(_SEED)
    made = integration if ours else ntx_ent_loss
    loss = made.NTXentLoss(temperature, memory_bank_size=(bank, dim) if bank else 0)
    loss = loss.to(dtype)  # and its bank
    if bank:  # a batch goes in first
        loss(_unit(rows, dim, dtype), _unit(rows, dim, dtype))
    return _loss_of(loss, [_unit(rows, dim, dtype), _unit(rows, dim, dtype)])


_ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def _ranking(
    options: dict[str, Any],
    columns: int,
    cached: bool,
    dtype: torch.dtype,
    ours: bool,
    rows: int = 97,
    dim: int = 32,
) -> Result:
    from sentence_transformers.sentence_transformer import losses

    from vatt_fast.integrations import sentence_transformers as integration

    torch.manual_seed(_SEED)
    made: Any = integration if ours else losses
    leaves = [_unit(rows, dim, dtype) for _ in range(columns)]
    model = nn.Sequential(nn.Identity())  # embeddings are given
    if cached:
        loss = made.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32, **options)
        return _loss_of(lambda *z: loss.calculate_loss([list(x.split(32)) for x in z]), leaves)
    loss = made.MultipleNegativesRankingLoss(model, **options)
    return _loss_of(lambda *z: loss.compute_loss_from_embeddings(list(z), None), leaves)


_RANKING: dict[str, tuple[dict[str, Any], int]] = {
    "pairs": ({}, 2),
    "pairs, both directions": (
        dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
        2,
    ),
    "two hard negatives": ({}, 4),
    "four directions, a hard negative": (dict(directions=_ALL_DIRECTIONS), 3),
}


# -- timm --------------------------------------------------------------------------------------


def _timm(name: str, arguments: dict[str, Any], dtype: torch.dtype, ours: bool) -> Result:
    import timm

    from vatt_fast.integrations import timm as integration

    integration.register()
    torch.manual_seed(_SEED)
    given = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10)
    layer = {"attn_layer": "vatt_fast"} if ours else {}
    model = timm.create_model(name, **given, **arguments, **layer).to(dtype).eval()
    output = model(torch.randn(2, 3, 32, 32, dtype=dtype))
    return _differentiated(output, list(model.parameters()))


def _case(library: str, name: str, function: Callable[..., Result], *arguments: Any) -> Case:
    return Case(library, name, functools.partial(function, *arguments))


CASES: tuple[Case, ...] = (
    *(_case("transformers", name, _transformers, name) for name in _MODELS),
    _case("open_clip", "ClipLoss", _open_clip, False),
    _case("open_clip", "ClipLoss, logit_bias", _open_clip, True),
    *(
        _case("sentence_transformers", f"{kind}, {name}", _ranking, options, columns, cached)
        for cached, kind in ((False, "MNRL"), (True, "CachedMNRL"))
        for name, (options, columns) in _RANKING.items()
    ),
    _case("lightly", "NTXentLoss", _lightly, 0.5, 0),
    _case("lightly", "NTXentLoss, temperature 0.07", _lightly, 0.07, 0),
    _case("lightly", "NTXentLoss, memory bank", _lightly, 0.1, 128),
    _case("timm", "ViT", _timm, "vit_base_patch16_224", {}),
    _case("timm", "ViT, norms of q and k", _timm, "vit_base_patch16_224", dict(qk_norm=True)),
)


def table() -> str:
    """Of all cases, as Markdown."""
    lines = [
        "| library | case | fp32 output | fp32 gradients | bf16 output | bf16 gradients"
        " | bf16 itself |",
        "|---|---|---|---|---|---|---|",
    ]
    without = {library: missing(library) for library in dict.fromkeys(c.library for c in CASES)}
    for case in CASES:
        if without[case.library] is not None:
            continue
        found = (*errors(case, torch.float32), *errors(case, torch.bfloat16))
        cells = [*(f"{error:.1e}" for error in found)]
        cells.append(" / ".join(f"{error:.1e}" for error in rounding(case)))
        lines.append(f"| {case.library} | {case.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{reason}" for reason in without.values() if reason)])


# -- memory ------------------------------------------------------------------------------------

_LOSSES: dict[str, tuple[str, Callable[..., Result]]] = {
    "ClipLoss": ("open_clip", functools.partial(_open_clip, False)),
    "MNRL, pairs": ("sentence_transformers", functools.partial(_ranking, {}, 2, False)),
    "CachedMNRL, pairs": ("sentence_transformers", functools.partial(_ranking, {}, 2, True)),
    "NTXentLoss": ("lightly", functools.partial(_lightly, 0.5, 0)),
}
_DIM = 256


def _peak(path: list[str], name: str, ours: bool, rows: int, send: Any) -> None:
    """MiB that one forward and backward add to what a tiny one needs."""
    sys.path[:] = path
    library, function = _LOSSES[name]
    missing(library)  # imports it as the parent did
    warnings.simplefilter("ignore")
    function(torch.float32, ours, rows=64, dim=_DIM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(torch.float32, ours, rows=rows, dim=_DIM)
    send.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _measured(name: str, ours: bool, rows: int) -> str:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sys.path, name, ours, rows, send))
    process.start()
    send.close()
    try:
        return f"{receive.recv():.0f}"
    except EOFError:
        return "died"
    finally:
        process.join()


def memory(rows: int, skip_theirs: bool) -> str:
    """Peak memory in MiB of one forward and backward, as Markdown."""
    lines = [f"| loss, batch {rows}, {_DIM} dimensions, fp32 | ours | theirs |", "|---|---|---|"]
    for name, (library, _) in _LOSSES.items():
        if missing(library) is None:
            theirs = "not run" if skip_theirs else _measured(name, False, rows)
            lines.append(f"| {library} {name} | {_measured(name, True, rows)} | {theirs} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, metavar="BATCH", help="peak memory of the losses")
    parser.add_argument("--ours", action="store_true", help="with --memory: leave theirs out")
    parser.add_argument("--packages", type=Path, help="a folder of packages, tried first")
    asked = parser.parse_args()
    if asked.packages:
        sys.path.insert(0, str(asked.packages))
    print(memory(asked.memory, asked.ours) if asked.memory else table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
