"""Gradients of a batch whose activations do not fit: gradient caching (Gao et al., 2021).

The encoders run twice over micro-batches. First without a graph, for the pooled vectors; heads,
batch norms and loss then see the whole batch, and leave a gradient for each vector. Then with a
graph, through which these go back. The result is that of the whole batch, where accumulating the
gradients of micro-batches would be that of smaller batches, with fewer negatives.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .losses import VATTLoss
from .model import VATT, VATTOutput

# of VATT.forward: what is divided along the batch
_INPUTS = ("video", "audio", "text")
_VALID = ("video_valid", "audio_valid", "text_valid")
_KEEPS = ("video_keep", "audio_keep")


def backward_in_micro_batches(
    model: Any,
    inputs: Mapping[str, Any],
    loss_of: Callable[[VATTOutput], VATTLoss],
    micro_batch: int,
    *,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
) -> VATTLoss:
    """The loss of a batch; its gradients are added to the parameters', as ``backward`` does.

    Takes the memory of a micro-batch, and the encoders' forward pass a second time.

        loss = backward_in_micro_batches(
            model, batch, lambda out: vatt_loss(out, config, scale=model.scale(), **valid), 64
        )

    DropToken's draw is an input. Dropout is drawn for each micro-batch, both times alike.

    Args:
        model: a VATT; also in DistributedDataParallel or sharded (``sharding.shard``), whose
            processes must then have equally many micro-batches. Their gradients are exchanged
            once, with the last micro-batch.
        inputs: arguments of ``model.forward`` by name: B clips.
        loss_of: output of the whole batch -> its loss; ``total`` goes backward.
        micro_batch: clips of one, at least 1; the last may be smaller.
        autocast: such as ``torch.autocast("cuda", torch.bfloat16)``, entered for every forward
            pass. Do not call from within one: backward passes should run outside.

    Returns:
        what ``loss_of`` returned, detached.

    Raises:
        ValueError: micro_batch below 1, or inputs that ``forward`` refuses.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}; it must be at least 1")
    autocast = autocast or contextlib.nullcontext()
    parts = list(_parts(inputs, micro_batch))
    devices = {x.device for x in inputs.values() if isinstance(x, Tensor) and x.is_cuda}
    states, found = [], []
    for part in parts:
        states.append(_random_state(devices))
        with torch.no_grad(), autocast:
            found.append(_pooled(model(**part, heads=False)))
    pooled = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    for vectors in pooled.values():
        vectors.requires_grad_()
    whole = {name: inputs[name] for name in (*_VALID, "group") if name in inputs}
    replicas = isinstance(model, DistributedDataParallel)
    # DistributedDataParallel exchanges gradients where all parameters have one: at the end
    with _exchanging(model, not replicas):
        with autocast:
            loss = loss_of(model(pooled=VATTOutput(**pooled), **whole))
        loss.total.backward()
    after, first = _random_state(devices), 0
    for part, state in zip(parts, states, strict=True):
        last = part is parts[-1]
        _set_random_state(state)
        with _exchanging(model, last):
            with autocast:
                again = _pooled(model(**part, heads=False))
            rows = slice(first, first := first + len(next(iter(again.values()))))
            pairs = [(vectors, pooled[name].grad) for name, vectors in again.items()]
            outputs = [vectors for vectors, whole_grad in pairs if whole_grad is not None]
            gradients = [whole_grad[rows] for _, whole_grad in pairs if whole_grad is not None]
            if last and replicas:
                outputs.append(_nothing(model.module))
                gradients.append(torch.ones_like(outputs[-1]))
            torch.autograd.backward(outputs, gradients)
    _set_random_state(after)
    return _detached(loss)


def _parts(inputs: Mapping[str, Any], micro_batch: int) -> Iterator[dict[str, Any]]:
    """``forward``'s arguments for the encoders, of each micro-batch."""
    clips = next((len(inputs[name]) for name in _INPUTS if inputs.get(name) is not None), 0)
    kept = {name: x for name, x in inputs.items() if name not in (*_VALID, "group")}
    for first in range(0, max(clips, 1), micro_batch):
        yield {
            name: x[first : first + micro_batch]
            if x is not None and (name in _INPUTS or (name in _KEEPS and x.ndim == 2))
            else x
            for name, x in kept.items()
        }


def _pooled(output: VATTOutput) -> dict[str, Tensor]:
    names = ("video_pooled", "audio_pooled", "text_pooled")
    found = {name: getattr(output, name) for name in names}
    return {name: x for name, x in found.items() if x is not None}


def _detached(loss: VATTLoss) -> VATTLoss:
    va, vt = (None if part is None else part.detach() for part in (loss.va, loss.vt))
    return VATTLoss(loss.total.detach(), va, vt)


def _nothing(model: VATT) -> Tensor:
    """0, on which the parameters of heads and temperature depend: their gradients are complete."""
    parameters = [*model.common_space.parameters(), model.log_scale]
    return torch.stack([p.flatten()[0] * 0 for p in parameters if p.requires_grad]).sum()


@contextlib.contextmanager
def _exchanging(model: Any, exchange: bool) -> Iterator[None]:
    """Whether a backward pass in here exchanges gradients between processes."""
    if isinstance(model, DistributedDataParallel) and not exchange:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(exchange)
    yield


# -- random numbers --------------------------------------------------------------------------------


def _random_state(devices: set[torch.device]) -> dict[Any, Tensor]:
    states: dict[Any, Tensor] = {device: torch.cuda.get_rng_state(device) for device in devices}
    return states | {"cpu": torch.get_rng_state()}


def _set_random_state(states: dict[Any, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
