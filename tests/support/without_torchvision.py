"""timm, open_clip and lightly import torchvision, which no build offers beside a CPU torch 2.13.

Their models and losses need it only for pictures. Where it does not import, ``stand_in()`` puts a
package in its place whose every name is an empty module: what is tested never calls one.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

from torch import nn


class _Members(type):
    def __getattr__(cls, name: str) -> str:
        """Of what is an enumeration in torchvision."""
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Members(name, (nn.Module,), {})
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def stand_in() -> None:
    """Do so, once, where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
