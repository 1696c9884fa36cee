"""Who runs: our backends and the peers of an op; ours and plain torch of a step."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vatt_fast.kernels import backends, parity
from vatt_fast.kernels.cases import Case, make

from . import calls
from .calls import Function
from .floors import Mode
from .machine import DTYPES
from .peers import Peer, peers
from .setting import AUTO, Setting, interpreted
from .steps import Formulation, Trainer
from .timer import Call, first_line


@dataclass
class Contender:
    """One who is timed."""

    name: str
    ours: bool
    # calls that differ in their inputs alone, each of the whole op, step or inference; or why none
    build: Callable[[Mode], Sequence[Call] | str]
    alike: bool = True  # False: another loss in the same role; its values are not compared
    package: str | None = None  # a library's
    errors: dict[str, float] = field(default_factory=dict)  # of an op's outputs and gradients


# -- of an op ---------------------------------------------------------------------------------


def of_op(
    setting: Setting, op: str, case: Case, dtype: str, absent: dict[str, str]
) -> list[Contender]:
    """Those that compute this case within bounds of error, ours first; ``absent`` takes reasons."""
    small = calls.reduced(case, setting.device)
    inputs = make(small, DTYPES[dtype], setting.device, seed=99)
    exact = calls.truth(op, inputs, DTYPES[dtype])
    plain = parity.errors(calls.values(calls.on_backend(op, "plain"), op, inputs), exact)
    sets = calls.input_sets(case, DTYPES[dtype], setting.device)
    names = setting.backends or (AUTO, *backends.BACKENDS[op])
    ours = {name: Peer(functools.partial(_backend, setting, op, name)) for name in names}
    theirs = peers(op, setting.peer_names)
    found: list[Contender] = []
    for name, each in (ours | theirs).items():
        errors: dict[str, float] = {}
        no_backward: str | None = None
        try:
            function = each.build(case, setting.device)
            if not isinstance(function, str) and each.alike:
                errors, no_backward = _errors(function, op, inputs, exact)
        except Exception as error:
            function = first_line(error)
        if isinstance(function, str):
            absent[name] = function
        elif name in ours and (reason := calls.red(errors, plain, DTYPES[dtype])):
            absent[name] = reason
            setting.set_verdict(op, name, reason)
            print(f"RED: {op} {name} on {case.name} {dtype}: {reason}; it is not timed")
        elif name in theirs and not max(errors.values(), default=0) < 1:
            absent[name] = f"it computes something else: errors {errors}"
        else:
            build = functools.partial(_build, function, op, sets, no_backward)
            found.append(Contender(name, name in ours, build, each.alike, each.package, errors))
    return found


def _backend(
    setting: Setting, op: str, name: str, case: Case, device: torch.device
) -> Function | str:
    """Ours, built as a peer is; or why it may not be timed."""
    if interpreted(name, device):
        return "Triton's interpreter runs it here: that takes no time worth telling"
    reason = setting.refusal([op]) if name == AUTO else setting.refused.get((op, name))
    return reason or calls.on_backend(op, "" if name == AUTO else name)


def _build(
    function: Function, op: str, sets: Sequence[dict[str, Any]], no_backward: str | None, mode: Mode
) -> Sequence[Call] | str:
    if no_backward and mode != "fwd":
        return no_backward
    return [calls.call(function, op, inputs, mode) for inputs in sets]


def _errors(
    function: Function, op: str, inputs: dict[str, Any], exact: calls.Values
) -> tuple[dict[str, float], str | None]:
    """Errors of outputs and gradients; without a backward those of the outputs, and why."""
    try:
        return parity.errors(calls.values(function, op, inputs), exact), None
    except Exception as error:
        with torch.no_grad():  # what fails here too is absent
            outputs = dict(zip(calls.compared(op), function(**inputs), strict=True))
        truth = {name: exact[name] for name in outputs}
        return parity.errors(outputs, truth), first_line(error)


# -- of a step --------------------------------------------------------------------------------


def of_step(trainer: Trainer, formulations: Sequence[Formulation]) -> list[Contender]:
    """The model by each formulation."""
    return [
        Contender(each.title, each.ours, functools.partial(trainer.calls, each))
        for each in formulations
    ]
