"""Operators of torch from one declaration: ``x``, ``x_backward``, and the gradient that joins them.

They are what ``torch.library.custom_op`` makes, with less work a call (docs/notes/dispatch.md has
the figures). That reads the operator's schema anew at every call, and checks every call for results
that share memory with inputs or each other; here tests do so (``parity.OwnMemory``).
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import flop_formulas
from .dispatch import autocast_dtype, choose

_library = torch.library.Library("vatt_fast", "FRAGMENT")


class Operator:
    """``torch.ops.vatt_fast.<name>`` and ``<name>_backward``: opaque to the compiler, with a first
    derivative, each run by the backend that its last argument names ("" chooses).

    ``call`` is the first of the two, and takes all arguments by position, the backend's name last.

    Args:
        arguments: a NamedTuple of tensors, None and plain values: its annotations are the schema.
        fake: arguments -> outputs of the right shapes and dtypes, contiguous.
        flops: (mode "fwd" or "bwd", arguments with shapes in place of tensors) -> FLOPs.
        tensors: so many arguments a backend takes by position; it takes the others by name.
        outputs: their names.
        gradients: the arguments that have a gradient, in the order in which backends return them.
        saved: the outputs that a backend's backward takes, after the tensors.
        wanted: {argument: the bool argument that says whether its gradient is wanted}. Only a
            backend's backward takes that one.
        weighed: arguments of ``wanted`` that a backend's ``unsupported`` takes too.
        sized: {argument: axis}: of these a backward needs nothing but the size of an axis. They
            are not saved, and a backend's backward takes the size after the tensors.
        optional: outputs whose gradient is None where nobody has used them. The gradients of
            others are zeros then.
        instead: what the message offers where a second derivative is asked for.
    """

    def __init__(
        self,
        name: str,
        arguments: type,
        fake: Callable[..., Any],
        flops: Callable[[str, Any], int] = lambda mode, shapes: 0,
        *,
        tensors: int,
        outputs: Sequence[str],
        gradients: Sequence[str],
        saved: Sequence[str] = (),
        wanted: Mapping[str, str] | None = None,
        weighed: Sequence[str] = (),
        sized: Mapping[str, int] | None = None,
        optional: Sequence[str] = (),
        instead: str,
    ):
        self.name, self.arguments, self.fake, self.flops = name, arguments, fake, flops
        self.outputs, self.saved, self.optional, self.instead = outputs, saved, optional, instead
        kinds: dict[str, Any] = get_type_hints(arguments)
        fields = tuple(kinds)
        place = {field: i for i, field in enumerate(fields)}
        wanted, sized = wanted or {}, sized or {}
        flags = set(wanted.values())
        # places of arguments: of options by name, of what autograd saves, of gradients
        self.count, self.tensors = len(fields), tensors
        self.options = fields[tensors:]
        self.only_backward = flags
        self.not_weighed = flags - set(weighed)
        self.sized = [(place[field], axis) for field, axis in sized.items()]
        self.sizes = {i for i, _ in self.sized}
        self.kept = [
            i for i, f in enumerate(fields) if _is_tensor(kinds[f]) and i not in self.sizes
        ]
        self.saved_outputs = [outputs.index(each) for each in saved]
        self.gradients = [(place[f], place.get(wanted.get(f, ""))) for f in gradients]

        define = functools.partial(_define, instead=instead)
        backward: dict[str, Any] = {
            f"d_{each}": Tensor | None if each in optional else Tensor for each in outputs
        }
        backward |= {f: list[int] if place[f] in self.sizes else kinds[f] for f in fields}
        backward |= dict.fromkeys(saved, Tensor)
        self.call = define(
            name, kinds, len(outputs), self._forward, self._fake, self._differentiate, self._save
        )
        self.call_backward = define(
            f"{name}_backward",
            backward,
            len(gradients),
            self._backward,
            self._fake_backward,
            self._refuse,
        )
        flop_formulas.add(getattr(torch.ops.vatt_fast, name), self._flops)
        flop_formulas.add(getattr(torch.ops.vatt_fast, f"{name}_backward"), self._backward_flops)

    # -- what runs inside ------------------------------------------------------------------------

    def _forward(self, *inputs):
        tensors = inputs[: self.tensors]
        # the backend's name, which is last, is left over
        options = all_options = dict(zip(self.options, inputs[self.tensors :]))  # noqa: B905
        if self.only_backward:
            options = {name: x for name, x in options.items() if name not in self.only_backward}
            for flag in self.not_weighed:
                del all_options[flag]
        module = choose(self.name, "fwd", inputs[-1], *tensors, **all_options)
        results = module.forward(*tensors, **options)
        if isinstance(results, tuple):
            return tuple([x.contiguous() for x in results])
        return results.contiguous()

    def _fake(self, *inputs):
        return self.fake(self.arguments(*inputs[:-1]))

    def _backward(self, *inputs):
        d_outputs, given, saved = self._split(inputs)
        tensors = like = given[: self.tensors]
        sizes = [given[i][axis] for i, axis in self.sized]
        if sizes:
            like = [d_outputs[0] if i in self.sizes else x for i, x in enumerate(tensors)]
            tensors = [x for i, x in enumerate(tensors) if i not in self.sizes]
        options = weighed = dict(zip(self.options, given[self.tensors :]))  # noqa: B905
        if self.not_weighed:
            weighed = {name: x for name, x in options.items() if name not in self.not_weighed}
        used = {
            f"{name}_grad": d_outputs[self.outputs.index(name)] is not None
            for name in self.optional
        }
        module = choose(self.name, "bwd", inputs[-1], *like, **used, **weighed)
        found = module.backward(*d_outputs, *tensors, *saved, *sizes, **options)
        found = found if isinstance(found, tuple | list) else (found,)
        results = []
        for (i, _), gradient in zip(self.gradients, found, strict=True):
            if gradient is None or given[i] is None:
                gradient = d_outputs[0].new_empty(0)  # absent gradients travel as empty tensors
            elif i not in self.sizes:
                gradient = gradient.to(given[i].dtype).contiguous()
            results.append(gradient)
        return tuple(results) if len(results) > 1 else results[0]

    def _fake_backward(self, *inputs):
        d_outputs, given, _ = self._split(inputs)
        results = []
        for i, flag in self.gradients:
            if given[i] is None or (flag is not None and not given[flag]):
                results.append(d_outputs[0].new_empty(0))
            elif i in self.sizes:
                results.append(d_outputs[0].new_empty(given[i]))
            else:
                results.append(given[i].new_empty(given[i].shape))
        return tuple(results) if len(results) > 1 else results[0]

    def _split(self, inputs):
        """Of the backward operator: gradients of outputs, arguments, saved outputs."""
        first, last = len(self.outputs), len(self.outputs) + self.count
        return inputs[:first], inputs[first:last], inputs[last : last + len(self.saved)]

    def _flops(self, *inputs, out_shape=None, **_) -> int:
        return self.flops("fwd", self.arguments(*inputs[: self.count]))

    def _backward_flops(self, *inputs, out_shape=None, **_) -> int:
        return self.flops("bwd", self.arguments(*self._split(inputs)[1]))

    # -- the gradient ----------------------------------------------------------------------------

    def _save(self, ctx, inputs, output) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(
            *[inputs[i] for i in self.kept], *[results[i] for i in self.saved_outputs]
        )
        given = list(inputs)
        for i in self.kept:
            given[i] = None
        for i in self.sizes:
            given[i] = list(inputs[i].shape)
        ctx.given = given
        if self.optional:
            ctx.set_materialize_grads(False)

    def _differentiate(self, ctx, *d_outputs):
        given, tensors = list(ctx.given), ctx.saved_tensors
        for i, x in zip(self.kept, tensors, strict=False):
            given[i] = x
        saved, backend = tensors[len(self.kept) :], given.pop()
        if self.optional:
            d_outputs = tuple(
                d if d is not None or name in self.optional else torch.zeros_like(output)
                for name, d, output in zip(self.outputs, d_outputs, saved, strict=True)
            )
        found = self.call_backward(*d_outputs, *given, *saved, backend)
        found = found if isinstance(found, tuple | list) else (found,)
        results: list[Tensor | None] = [None] * (self.count + 1)
        for (i, flag), gradient in zip(self.gradients, found, strict=True):
            if given[i] is not None and (flag is None or given[flag]):
                results[i] = gradient
        return results

    def _refuse(self, ctx, *_):
        raise NotImplementedError(f"{self.name} has no second derivative; for one, {self.instead}")


def operator(name: str) -> torch._ops.OpOverload:
    """``torch.ops.vatt_fast.<name>.default``, as graphs and dispatch modes see it."""
    return getattr(torch.ops.vatt_fast, name).default


def _is_tensor(kind: Any) -> bool:
    return kind is Tensor or kind == Tensor | None


# -- one operator --------------------------------------------------------------------------------


def _define(
    name: str,
    arguments: Mapping[str, Any],
    results: int,
    implementation: Callable,
    fake: Callable,
    differentiate: Callable[..., Sequence],
    save: Callable[[Any, tuple, Any], None] = lambda ctx, inputs, output: None,
    *,
    instead: str,
) -> Callable[..., Any]:
    """``torch.ops.vatt_fast.<name>`` on ``arguments`` {name: kind} and a backend.

    Args:
        results: so many tensors it returns.
        implementation: returns new tensors; the caller's autocast is off inside.
        fake: the same on tensors without values.
        differentiate, save: ``backward(ctx, *gradients)`` and ``setup_context(ctx, inputs,
            output)`` as of ``torch.autograd.Function``.
        instead: what the message offers where a forward-mode derivative is asked for.
    """
    _library.define(
        name + _schema({**arguments, "backend": str}, results), tags=(torch.Tag.pt2_compliant_tag,)
    )
    run = torch._disable_dynamo(_without_autocast(implementation))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vatt_fast::{name}", fake, lib=_library)
    overload = operator(name)

    def below_autograd(*inputs_and_keys):
        *inputs, keys = inputs_and_keys
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx, *inputs_and_keys):
        if torch._C._are_functorch_transforms_active():
            with torch.enable_grad():  # an outer torch.func.grad records what this one runs
                output = below_autograd(*inputs_and_keys)
        else:
            output = below_autograd(*inputs_and_keys)
        save(ctx, inputs_and_keys[:-1], output)
        return output

    def backward(ctx, *gradients):
        return *differentiate(ctx, *gradients), None

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    # torch.autograd.Function's own apply asks a functorch transform, which has come to us, again
    apply = super(torch.autograd.Function, function).apply

    def autograd(keys, *inputs):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, dual tensors);"
                f" for one, {instead}"
            )
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(*inputs, keys)
        if not torch._C._are_functorch_transforms_active():
            return apply(*inputs, keys)
        with enable_single_level_autograd_function():
            return apply(*inputs, keys)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return overload


def _schema(arguments: Mapping[str, Any], results: int) -> str:
    """As torch writes it: "(Tensor q, ..., str backend) -> (Tensor, Tensor)"."""

    def prototype():
        raise AssertionError("only its signature is read")

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    returns = Tensor if results == 1 else tuple[(Tensor,) * results]  # type: ignore[misc]
    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=each) for name, each in arguments.items()],
        return_annotation=returns,
    )
    return torch.library.infer_schema(prototype, mutates_args=())


def _has_tangent(x: Any) -> bool:
    """Also within the wrappers of torch.func's transforms."""
    while isinstance(x, Tensor):
        if forward_ad.unpack_dual(x).tangent is not None:
            return True
        if not (functorch.is_gradtrackingtensor(x) or functorch.is_batchedtensor(x)):
            return False
        x = functorch.get_unwrapped(x)
    return False


def _without_autocast(implementation: Callable) -> Callable:
    """Inside an op the caller's autocast is off, and the tensors' GPU is the current one.

    The public wrapper has cast what should be cast, and backends choose the rest. Triton launches
    on the current GPU, whichever the tensors are on.
    """

    @functools.wraps(implementation)
    def run(*args, **kwargs):
        device = args[0].device
        autocast = autocast_dtype(device) is not None
        if not autocast and device.type != "cuda":
            return implementation(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            if autocast:
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            return implementation(*args, **kwargs)

    return run
