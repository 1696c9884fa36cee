"""FLOPs of the operators for torch's FlopCounterMode.

``torch.utils.flop_counter`` imports Triton, where that is installed: a sixth of a second and tens
of megabytes. Nobody pays for it who counts nothing: the formulas are registered when somebody
imports the counter.
"""

import importlib.abc
import sys
from collections.abc import Callable
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def add(operator: Any, formula: Callable[..., int]) -> None:
    """Count ``operator`` (an OpOverloadPacket) by ``formula(*shapes, out_shape) -> FLOPs``."""
    _waiting.append((operator, formula))
    if _COUNTER in sys.modules:
        _register()
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _register() -> None:
    counter: Any = sys.modules[_COUNTER]
    while _waiting:
        operator, formula = _waiting.pop()
        counter.register_flop_formula(operator)(formula)


class _AfterTheCounter(importlib.abc.MetaPathFinder):
    """Leaves the search to the others, and registers what waits once the counter is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        others = (each for each in sys.meta_path if each is not self)
        found = (each.find_spec(name, path, target) for each in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


_finder = _AfterTheCounter()
