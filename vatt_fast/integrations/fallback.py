"""Say once, for every reason, that a library's own path runs in place of ours."""

import warnings

import torch

_said: set[str] = set()


class RunsTheOriginal(UserWarning):
    """A call that the ops do not take went to the library's own code."""


def say(what: str, instead: str, reason: str) -> None:
    """Warn, the first time in this process."""
    text = f"{what}: {instead} runs, because {reason}"
    if text not in _said and not torch.compiler.is_compiling():
        _said.add(text)
        warnings.warn(text, RunsTheOriginal, stacklevel=3)
