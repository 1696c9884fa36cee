"""The battery's check as functions: an op's outputs and gradients judged by plain torch's error.

The tolerance rule stands in ``assert_as_good_as_plain`` and in docs/testing.md. The tests and the
benchmarks, which time only what is green, both call ``check``.
"""

import contextlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case, make
from .ops import OPS
from .settings import use_backend

Values = dict[str, Tensor]  # {output: value, "d_input": gradient}


def check(
    op: str,
    backend: str,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    without: Sequence[str] = (),
    function: Callable[..., Any] | None = None,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Values:
    """Run an op forward and backward on one draw, and hold it against plain torch.

    Args:
        backend: by name; "" takes what would be chosen.
        dtype: the compute dtype.
        without: outputs that receive no gradient.
        function: in place of the op's public function.
        context: entered around the run.

    Returns:
        {output: value, "d_input": gradient}.

    Raises:
        AssertionError: a value breaks the tolerance rule; names the tensor and both errors.
        ValueError: the backend "cannot run this" case.
    """
    seed = seed_of(case)
    inputs = make(case, dtype, seed=seed)
    there = make(case, dtype, device, seed=seed)
    with use_backend(**{op: backend} if backend else {}), context(), OwnMemory():
        result = run(function or OPS[op].function, op, there, dtype=dtype, without=without)
    yardstick, truth = expected(op, inputs, dtype, without=without)
    assert_as_good_as_plain(
        result,
        yardstick,
        truth,
        dtype,
        cancelled_rows(op, inputs),
        score_eps=score_roundings(op, inputs, dtype),
    )
    return result


def expected(
    op: str, inputs: Mapping[str, Any], dtype: torch.dtype, *, without: Sequence[str] = ()
) -> tuple[Values, Values]:
    """Plain torch's values on the inputs (the yardstick), and on the same inputs in fp64 (the
    truth). Both receive the gradients that ``run`` draws in ``dtype``."""
    plain = OPS[op].plain
    return (
        run(plain, op, inputs, dtype=dtype, without=without),
        run(plain, op, promote(inputs, torch.float64), dtype=dtype, without=without),
    )


def seed_of(case: Case) -> int:
    """Of the draw that ``check`` makes of a case."""
    return zlib.crc32(case.name.encode())


class OwnMemory(TorchDispatchMode):
    """Results of our operators share memory with no input and no other result.

    torch may write into any of them.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        if function.namespace == "vatt_fast":
            self.check(function, args, results if isinstance(results, tuple | list) else (results,))
        return results

    def check(self, function, args, results) -> None:
        taken = {_memory(each) for each in args if isinstance(each, Tensor)}
        for i, each in enumerate(results):
            if each.numel():
                assert _memory(each) not in taken, (
                    f"result {i} of {function} lies in memory that is not its own"
                )
                taken.add(_memory(each))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# -- running -------------------------------------------------------------------------------------


def promote(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same values with every float in ``dtype``."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def cast_like(seeds: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        seed.to(output.dtype).to(output.device) for seed, output in zip(seeds, outputs, strict=True)
    ]


def draw_seeds(outputs: Any, dtype: torch.dtype, seed: int = 7) -> list[Tensor]:
    """Gradients of the outputs, values of ``dtype``."""
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(output.shape, generator=generator).to(dtype) for output in outputs]


def run(
    function: Callable[..., Any],
    op: str,
    inputs: Mapping[str, Any],
    seeds: Sequence[Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    without: Sequence[str] = (),
) -> Values:
    """One forward and backward of ``function``, which takes the op's arguments.

    Args:
        seeds: gradients of the outputs; drawn in ``dtype`` if None.
        without: outputs that receive no gradient.
    """
    inputs = dict(inputs)
    leaves = {}
    for name in OPS[op].differentiable:
        value = inputs[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = leaves[name] = value.detach().requires_grad_()
    outputs = function(**inputs)
    seeds = draw_seeds(outputs, dtype) if seeds is None else seeds
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = zip(outputs, cast_like(seeds, outputs), strict=True)
    named = dict(zip(OPS[op].outputs, pairs, strict=True))
    used = [pair for name, pair in named.items() if name not in without]
    torch.autograd.backward([output for output, _ in used], [seed for _, seed in used])
    result = {name: output.detach() for name, (output, _) in named.items()}
    return result | {
        f"d_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }


# -- judging -------------------------------------------------------------------------------------


def errors(values: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """||x - truth|| / ||truth|| of every tensor of ``truth``; the absolute error where that is 0.

    inf where one is finite and the other is not. What is infinite in both is left out.
    """
    found = {}
    for name, exact in truth.items():
        value, exact = values[name].double(), exact.double()
        finite = exact.isfinite()
        if not torch.equal(value.isfinite(), finite):
            found[name] = float("inf")
            continue
        error = torch.where(finite, value - exact, 0.0).norm()
        unit = torch.where(finite, exact, 0.0).norm()
        found[name] = float(error / unit) if unit else float(error)
    return found


def assert_as_good_as_plain(
    result: Values,
    yardstick: Values,
    truth: Values,
    dtype: torch.dtype,
    cancelled: Mapping[str, Tensor] | None = None,
    *,
    slack_eps: float = 0.5,
    score_eps: float = 0.0,
) -> None:
    """The tolerance rule (docs/testing.md): an error of at most twice plain torch's plus a slack.

    In the worst row at most 8 times plain's worst row plus the slack. Exact where the truth is 0
    or -inf.

    Args:
        yardstick: plain torch's values in the same dtype.
        cancelled: see ``cancelled_rows``.
        slack_eps: the slack, in eps of ``dtype``.
        score_eps: more slack for gradients, see ``score_roundings``.
    """
    assert set(result) == set(truth)
    largest = max(tensor.norm() for name, tensor in truth.items() if name.startswith("d_"))
    for name, exact in truth.items():
        _compare_one(
            name,
            result[name],
            yardstick[name].double().cpu(),
            exact,
            dtype,
            by_cancellation=(cancelled or {}).get(name, torch.tensor(False)),
            largest=float(largest),
            slack_eps=slack_eps + (score_eps if name.startswith("d_") else 0.0),
            slack_eps_of_one=8 + 2 * (score_eps if name.startswith("d_") else 0.0),
        )


def _compare_one(
    name: str,
    value: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    by_cancellation: Tensor,
    largest: float,
    slack_eps: float,
    slack_eps_of_one: float,
) -> None:
    eps = torch.finfo(dtype).eps
    ours = value.double().cpu()
    assert ours.shape == exact.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    )
    special = ((exact == 0) | (exact == -torch.inf)) & ~by_cancellation
    _assert_none(name, special & (ours != exact), ours, exact, "must be exact")
    finite = exact.isfinite()
    _assert_none(name, finite & ~ours.isfinite(), ours, exact, "must be finite")
    # d_p - delta leaves its roundings where the gradient cancels
    leftover = torch.where(by_cancellation, ours - exact, 0.0).norm()
    assert leftover <= 4 * eps * largest, (
        f"{name}: {leftover:.2e} where exact arithmetic gives 0, largest gradient {largest:.2e}"
    )
    judged = finite & ~by_cancellation
    ours, plain, exact = (torch.where(judged, tensor, 0.0) for tensor in (ours, plain, exact))
    if not exact.any():
        return  # the comparisons above have covered all of it
    error, plain_error = (errors({name: x}, {name: exact})[name] for x in (ours, plain))
    rows, plain_rows, exact_rows = (
        _rows(tensor).norm(dim=1) for tensor in (ours - exact, plain - exact, exact)
    )
    worst = rows.argmax()
    where = (
        f"{name}: error {error:.2e}, plain torch {plain_error:.2e},"
        f" worst in row {int(worst)} of {len(rows)} ({rows[worst]:.2e})"
    )
    if dtype == torch.float64:  # the truth's own precision
        assert error <= max(1e-12, torch.finfo(value.dtype).eps), where
        return
    # of one number plain's error is one draw, and may be luck
    slack = eps * (slack_eps if exact.numel() > 1 else slack_eps_of_one)
    assert error <= 2 * plain_error + slack, where
    bound = 8 * plain_rows.max() + slack * exact_rows.max()
    assert rows[worst] <= bound, f"{where}; plain's worst row {plain_rows.max():.2e}"


def cancelled_rows(op: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks of gradients that are zero in exact arithmetic by cancellation.

    An exact zero cannot be asked for there.
    """
    if op != "attention":
        return {}
    (B, T), S = inputs["q"].shape[:2], inputs["k"].shape[1]
    mask = inputs.get("key_mask")
    seen = torch.ones(B, T, S, dtype=torch.bool)
    if mask is not None:
        seen &= mask.cpu()[:, None]
    if inputs.get("causal"):
        seen = seen.tril()
    visible = seen.sum(2)
    alone = visible == 1  # the softmax of one score is constant
    only_there = seen.any(1) & ~(seen & ~alone[..., None]).any(1)
    masks = {
        "d_q": alone[..., None, None].expand(inputs["q"].shape),
        "d_k": only_there[..., None, None].expand(inputs["k"].shape),
    }
    if inputs.get("bias") is not None:
        masks["d_bias"] = (visible <= 1).all(0)[:, None].expand(inputs["bias"].shape)
    return masks


def score_roundings(
    op: str, inputs: Mapping[str, Any], dtype: torch.dtype, *, handed_over: bool = False
) -> float:
    """In eps of ``dtype``: the rounding of a usual score, which exp passes on to gradients.

    A backward computes the scores anew, and may sum in another order.

    Args:
        handed_over: of the score with the largest terms, because the forward, and so lse, was
            another backend's.
    """
    if op not in ("attention", "contrastive_lse") or dtype == torch.float64:
        return 0.0
    names, axes = (
        (("q", "k"), "bthd,bshd->bhts") if op == "attention" else (("x", "y"), "md,nd->mn")
    )
    left, right = (inputs[name].double() for name in names)
    if handed_over:
        size = torch.einsum(axes, left.abs(), right.abs()).max()
    else:
        size = torch.einsum(axes, left, right).square().mean().sqrt()
    eps = 0.5 * torch.finfo(torch.float32).eps * float(inputs["scale"]) * float(size)
    return eps / torch.finfo(dtype).eps  # scores are fp32, whatever the dtype


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def _assert_none(name: str, wrong: Tensor, ours: Tensor, exact: Tensor, rule: str) -> None:
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(index)} is {ours[index]:.3e}, truth {exact[index]:.3e}: {rule}"
            f" ({int(wrong.sum())} of {wrong.numel()})"
        )
