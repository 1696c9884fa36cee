"""Our ops inside other libraries, held against the libraries' own paths; and peak memory of losses.

    python -m bench integrations                 the errors, as a Markdown table
    python -m bench integrations --speed 15      beside them time, of as many interleaved rounds
    python -m bench integrations --memory 8192   peak memory of the losses at this batch

Models are small and of random weights. An error is ||ours - theirs|| / ||theirs||, of the output
and of all gradients as one vector. What bf16 itself costs the library stands beside it: its own
bf16 path against its fp32 path. Libraries that do not import are left out, with the reason.
"""

import functools
import importlib
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
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


Step = Callable[[], Result]  # a forward and backward; again and again


class Case(NamedTuple):
    """A library's path and ours, on the same weights and inputs."""

    library: str
    name: str
    prepare: Callable[[torch.dtype, bool], Step]  # (dtype, ours)
    prepare_real: Callable[[torch.dtype, bool], Step]  # the same of a real size

    def run(self, dtype: torch.dtype, ours: bool) -> Result:
        return self.prepare(dtype, ours)()


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


def time_ratio(case: Case, rounds: int) -> float:
    """Of ours against theirs, fp32: the median ratio of rounds, each of both in turn."""
    steps = [case.prepare_real(torch.float32, ours) for ours in (True, False)]
    ratios = []
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            steps[place]()
            seconds[place] = time.perf_counter() - start
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round warms up


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
    for x in leaves:
        x.grad = None
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
_REAL: dict[str, Any] = dict(
    hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536
)


class _Model(NamedTuple):
    model: str
    config: str
    arguments: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    output: str = "last_hidden_state"


def _images(size: int, count: int) -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(count, 3, size, size))


def _words(length: int, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (3, length))
    if not padded:
        return dict(input_ids=ids)
    lengths = torch.tensor([[length], [2 * length // 3], [length // 4]])
    return dict(input_ids=ids, attention_mask=(torch.arange(length) < lengths) + 0)


def _sound(samples: int, padded: bool) -> dict[str, Tensor]:
    given = dict(input_values=torch.randn(2, samples))
    if padded:
        lengths = torch.tensor([[samples], [3 * samples // 5]])
        given["attention_mask"] = (torch.arange(samples) < lengths) + 0
    return given


def _models(sizes: dict[str, Any], image: int, words: int, samples: int) -> dict[str, _Model]:
    vision: dict[str, Any] = dict(**sizes, image_size=image, patch_size=8)
    text: dict[str, Any] = dict(
        **sizes,
        vocab_size=99,
        max_position_embeddings=words,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    both: dict[str, Any] = dict(text_config=text, vision_config=vision)
    mel: dict[str, Any] = dict(
        **sizes,
        num_mel_bins=image,
        max_length=2 * image,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    )
    wave: dict[str, Any] = dict(
        **sizes,
        conv_dim=(32,) * 4,
        conv_stride=(5, 2, 2, 2),
        conv_kernel=(10, 3, 3, 3),
        num_feat_extract_layers=4,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
    )

    def pictures_and_words() -> dict[str, Tensor]:
        return _words(words, True) | _images(image, 3)

    def frames() -> dict[str, Tensor]:
        return dict(pixel_values=torch.randn(2, 4, 3, image, image))

    def mels() -> dict[str, Tensor]:
        return dict(input_values=torch.randn(2, 2 * image, image))

    captions = ("CLIPTextModel", "CLIPTextConfig", text)
    logits = "logits_per_image"
    found = {
        "ViT": _Model("ViTModel", "ViTConfig", vision, functools.partial(_images, image, 2)),
        "VideoMAE": _Model("VideoMAEModel", "VideoMAEConfig", vision | dict(num_frames=4), frames),
        "CLIP text, causal": _Model(*captions, functools.partial(_words, words, False)),
        "CLIP text, causal, padded": _Model(*captions, functools.partial(_words, words, True)),
        "CLIP": _Model(
            "CLIPModel", "CLIPConfig", both | dict(projection_dim=32), pictures_and_words, logits
        ),
        "SigLIP, padded": _Model("SiglipModel", "SiglipConfig", both, pictures_and_words, logits),
        "AST": _Model("ASTModel", "ASTConfig", mel, mels),
    }
    for padded in (False, True):
        inputs = functools.partial(_sound, samples, padded)
        name = f"Wav2Vec2{', padded' * padded}"
        found[name] = _Model("Wav2Vec2Model", "Wav2Vec2Config", wave, inputs)
    return found


_MODELS = _models(_SIZES, image=32, words=12, samples=2000)
_REAL_MODELS = _models(_REAL, image=112, words=77, samples=16000)


def _transformers(models: dict[str, _Model], name: str, dtype: torch.dtype, ours: bool) -> Step:
    import transformers

    from vatt_fast.integrations import transformers as integration

    integration.register()
    each = models[name]
    torch.manual_seed(_SEED)
    built = getattr(transformers, each.model)(getattr(transformers, each.config)(**each.arguments))
    built.set_attn_implementation("vatt_fast" if ours else "sdpa")
    built = built.to(dtype).eval()  # no dropout; gradients all the same
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in each.inputs().items()}
    leaves = list(built.parameters())
    return lambda: _differentiated(getattr(built(**given), each.output), leaves)


# -- losses ------------------------------------------------------------------------------------


def _unit(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype).requires_grad_()


def _loss_of(loss: Callable[..., Tensor], leaves: list[Tensor]) -> Step:
    def step() -> Result:
        for x in leaves:
            x.grad = None
        value = loss(*leaves)
        value.backward()
        gradients = [x.grad.float().flatten() for x in leaves if x.grad is not None]
        return Result(value.detach(), torch.cat(gradients))

    return step


def _open_clip(bias: bool, dtype: torch.dtype, ours: bool, rows: int = 97, dim: int = 32) -> Step:
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
    temperature: float,
    dtype: torch.dtype,
    ours: bool,
    rows: int = 300,
    dim: int = 32,
    bank: int = 0,
) -> Step:
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
) -> Step:
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


def _timm(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    ours: bool,
    size: int = 32,
    dim: int = 64,
    heads: int = 4,
) -> Step:
    import timm

    from vatt_fast.integrations import timm as integration

    integration.register()
    torch.manual_seed(_SEED)
    given: dict[str, Any] = dict(img_size=size, embed_dim=dim, num_heads=heads)
    given |= dict(patch_size=8, depth=2, num_classes=10)
    layer = {"attn_layer": "vatt_fast"} if ours else {}
    model = timm.create_model("vit_base_patch16_224", **given, **arguments, **layer)
    model = model.to(dtype).eval()
    images, leaves = torch.randn(2, 3, size, size, dtype=dtype), list(model.parameters())
    return lambda: _differentiated(model(images), leaves)


def _case(library: str, name: str, prepare: Callable[..., Step], **real: Any) -> Case:
    return Case(library, name, prepare, functools.partial(prepare, **real))


_REAL_LOSS: dict[str, Any] = dict(rows=1024, dim=256)
_REAL_BANK: dict[str, Any] = dict(rows=256, dim=256, bank=4096)
_REAL_TIMM: dict[str, Any] = dict(size=112, dim=384, heads=6)
_partial = functools.partial
CASES: tuple[Case, ...] = (
    *(
        Case(
            *("transformers", name),
            _partial(_transformers, _MODELS, name),
            _partial(_transformers, _REAL_MODELS, name),
        )
        for name in _MODELS
    ),
    _case("open_clip", "ClipLoss", _partial(_open_clip, False), **_REAL_LOSS),
    _case("open_clip", "ClipLoss, logit_bias", _partial(_open_clip, True), **_REAL_LOSS),
    *(
        _case(
            *("sentence_transformers", f"{kind}, {name}"),
            _partial(_ranking, options, columns, cached),
            **_REAL_LOSS,
        )
        for cached, kind in ((False, "MNRL"), (True, "CachedMNRL"))
        for name, (options, columns) in _RANKING.items()
    ),
    _case("lightly", "NTXentLoss", _partial(_lightly, 0.5), **_REAL_LOSS),
    _case("lightly", "NTXentLoss, temperature 0.07", _partial(_lightly, 0.07), **_REAL_LOSS),
    _case(
        "lightly", "NTXentLoss, small memory bank", _partial(_lightly, 0.1, bank=40), **_REAL_LOSS
    ),
    _case("lightly", "NTXentLoss, memory bank", _partial(_lightly, 0.1, bank=512), **_REAL_BANK),
    _case("timm", "ViT", _partial(_timm, {}), **_REAL_TIMM),
    _case("timm", "ViT, norms of q and k", _partial(_timm, dict(qk_norm=True)), **_REAL_TIMM),
)


def table(rounds: int = 0) -> str:
    """Of all cases, as Markdown; with rounds of timing a column of time."""
    timed = rounds > 0
    lines = [
        "| library | case | fp32 output | fp32 gradients | bf16 output | bf16 gradients"
        " | bf16 itself |" + " time, ours / theirs |" * timed,
        "|---|---|---|---|---|---|---|" + "---|" * timed,
    ]
    without = {library: missing(library) for library in dict.fromkeys(c.library for c in CASES)}
    for case in CASES:
        if without[case.library] is not None:
            continue
        found = (*errors(case, torch.float32), *errors(case, torch.bfloat16))
        cells = [*(f"{error:.1e}" for error in found)]
        cells.append(" / ".join(f"{error:.1e}" for error in rounding(case)))
        if timed:
            cells.append(f"{time_ratio(case, rounds):.2f}")
        lines.append(f"| {case.library} | {case.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{reason}" for reason in without.values() if reason)])


# -- memory ------------------------------------------------------------------------------------

_LOSSES: dict[str, tuple[str, Callable[..., Step]]] = {
    "ClipLoss": ("open_clip", functools.partial(_open_clip, False)),
    "MNRL, pairs": ("sentence_transformers", functools.partial(_ranking, {}, 2, False)),
    "CachedMNRL, pairs": ("sentence_transformers", functools.partial(_ranking, {}, 2, True)),
    "NTXentLoss": ("lightly", functools.partial(_lightly, 0.5)),
}
_DIM = 256


def _peak(path: list[str], name: str, ours: bool, rows: int, send: Any) -> None:
    """MiB that one forward and backward add to what a tiny one needs."""
    sys.path[:] = path
    library, function = _LOSSES[name]
    missing(library)  # imports it as the parent did
    warnings.simplefilter("ignore")
    function(torch.float32, ours, rows=64, dim=_DIM)()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(torch.float32, ours, rows=rows, dim=_DIM)()
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


def run(batch: int | None, rounds: int, ours_alone: bool, packages: Path | None) -> int:
    """Print the table, or with a batch the peak memory of the losses.

    Args:
        rounds: of time; 0 leaves its column out.
        ours_alone: of the memory.
        packages: a folder of packages, which are tried first.
    """
    if packages:
        sys.path.insert(0, str(packages))
    print(table(rounds) if batch is None else memory(batch, ours_alone))
    return 0
