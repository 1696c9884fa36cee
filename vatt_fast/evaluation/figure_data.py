"""What the paper's Figures 2 to 4 show of a model: numbers from clips, before any drawing.

Shapes: N clips, d dimensions of a space, L blocks, F nodes of a block's MLP.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MODALITIES
from ..data.clips import Batch
from ..model import VATT

# the two spaces in which modalities meet, with what each modality's embedding is called
SPACES = {
    "S_va": {"video": "z_video_va", "audio": "z_audio_va"},
    "S_vt": {"video": "z_video_vt", "text": "z_text_vt"},
}


@dataclass(frozen=True)
class Collected:
    """Of N clips; rows of a modality that a clip lacks are nan.

    Args:
        inputs: by modality (N, dim), the mean of the tokens that enter the encoder, without AGG.
        outputs: by embedding (N, d), of unit norm.
        activations: by modality (L, F), the mean of each node after GELU, over tokens and clips.
        files: of the clips.
    """

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    activations: dict[str, np.ndarray]
    files: list[str]


@torch.no_grad()
def collect(model: VATT, batches: Iterable[Batch], most: int) -> Collected:
    """Run at most ``most`` clips through the model, a modality at a time; of text the sentence
    nearest to the window.

    Raises:
        ValueError: no clips, or fewer than two.
    """
    device = model.log_scale.device
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    watched = {modality: _Nodes(_encoder(model, modality)) for modality in MODALITIES}
    files: list[str] = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            count = min(len(batch), most - len(files))
            if not count:
                break
            files += batch.files[:count]
            for modality in MODALITIES:
                values, valid = _of(batch, modality, count)
                mask = (values[:, 0] != 0) if modality == "text" else None
                with _tokens(model, modality) as tokens, watched[modality].counting(mask, valid):
                    out = model(**{modality: values.to(device)}, features=True)
                gone = ~valid[:, None]
                entered = _mean(tokens[0][:, 1:], mask)
                inputs.setdefault(modality, []).append(entered.masked_fill(gone, torch.nan))
                for names in SPACES.values():
                    if modality in names:
                        z = getattr(out, names[modality]).float().cpu().reshape(count, -1)
                        z = torch.nn.functional.normalize(z, dim=-1).masked_fill(gone, torch.nan)
                        outputs.setdefault(names[modality], []).append(z)
    finally:
        model.train(training)
    if len(files) < 2:
        raise ValueError(f"{len(files)} clips can be read; figures take at least two")
    return Collected(
        {name: torch.cat(parts).numpy() for name, parts in inputs.items()},
        {name: torch.cat(parts).numpy() for name, parts in outputs.items()},
        {name: nodes.mean() for name, nodes in watched.items() if nodes.count},
        files,
    )


def similarities(collected: Collected, space: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of a space's two modalities: of each clip with itself (n,), and with all others."""
    first, second = (collected.outputs[name] for name in SPACES[space].values())
    there = np.isfinite(first).all(1) & np.isfinite(second).all(1)
    cosines = first[there] @ second[there].T
    own = np.eye(len(cosines), dtype=bool)
    return cosines[own], cosines[~own]


def separation(positive: np.ndarray, negative: np.ndarray) -> float:
    """How often a positive is more similar than a negative, in percent; 50 is chance."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(100 * below.mean() / (2 * len(negative)))


def together(parts: dict[str, np.ndarray]) -> tuple[np.ndarray, list[str]] | None:
    """The finite rows of several (N, d) below one another, and whose each is; None where widths
    differ."""
    if len({part.shape[1] for part in parts.values()}) != 1:
        return None
    kept = {name: part[np.isfinite(part).all(1)] for name, part in parts.items()}
    names = [name for name, part in kept.items() for _ in range(len(part))]
    return np.concatenate(list(kept.values())), names


def flat(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n, d) -> (n, 2) by t-SNE.

    Raises:
        ValueError: fewer than four points. ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("figures need scikit-learn: pip install 'vatt_fast[eval]'") from error
    if len(points) < 4:
        raise ValueError(f"t-SNE of {len(points)} points; it takes at least four")
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] > 1 else "random"
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(points)


def _of(batch: Batch, modality: str, count: int) -> tuple[Tensor, Tensor]:
    values = getattr(batch, modality)[:count]
    valid = getattr(batch, f"{modality}_valid")[:count]
    return (values[:, :1], valid[:, 0]) if modality == "text" else (values, valid)


def _encoder(model: Any, modality: str) -> Any:
    return model.trunk if model.config.agnostic else getattr(model, f"{modality}_encoder")


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, dim) -> (B, dim) over the tokens of the mask, on the CPU."""
    tokens = tokens.float().cpu()
    if mask is None:
        return tokens.mean(1)
    kept = mask[..., None]
    return (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)


@contextlib.contextmanager
def _tokens(model: Any, modality: str) -> Iterator[list[Tensor]]:
    """What the modality's tokens are, AGG first, in a list that a call fills."""
    found: list[Tensor] = []
    handle = getattr(model, f"{modality}_tokens").register_forward_hook(
        lambda module, args, out: found.append(out)
    )
    try:
        yield found
    finally:
        handle.remove()


class _Nodes:
    """Sums of what enters each block's second product, over valid tokens."""

    def __init__(self, encoder: Any) -> None:
        self.blocks = list(encoder.blocks)
        self.sums = [torch.zeros(block.mlp_out.in_features).double() for block in self.blocks]
        self.count = 0

    @contextlib.contextmanager
    def counting(self, mask: Tensor | None, valid: Tensor) -> Iterator[None]:
        """Of one call with as many rows as ``valid``; ``mask`` (B, W) says which tokens count."""

        def add(number: int, hidden: Tensor) -> None:
            kept = valid[:, None].expand(hidden.shape[:2])
            if mask is not None:
                agg = torch.ones(len(mask), 1, dtype=torch.bool)
                kept = kept & torch.cat((agg, mask), 1)
            weights = kept.double()[..., None]
            self.sums[number] += (hidden.double().cpu() * weights).sum((0, 1))
            if number == 0:
                self.count += int(kept.sum())

        handles = [
            block.mlp_out.register_forward_pre_hook(
                lambda module, args, number=number: add(number, args[0])
            )
            for number, block in enumerate(self.blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mean(self) -> np.ndarray:
        return torch.stack(self.sums).div(self.count).float().numpy()
