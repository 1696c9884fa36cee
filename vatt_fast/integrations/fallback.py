"""Say once, for every reason, that a library's own path runs in place of ours."""

import warnings

_said: set[str] = set()


class RunsTheOriginal(UserWarning):
    """A call that the ops do not take went to the library's own code."""


def say(what: str, instead: str, reason: str) -> None:
    """Warn, the first time in this process; of a compiled call as it is traced.

    Sizes do not belong into the texts: they may be symbolic, and each would be said anew.
    """
    text = f"{what}: {instead} runs, because {reason}"
    if text not in _said:
        _said.add(text)
        warnings.warn(text, RunsTheOriginal, stacklevel=3)


# ``torch.compiler.assume_constant_result``, which imports the whole compiler to set this: it is
# called as dynamo traces, and leaves nothing in the graph
say._dynamo_marked_constant = True  # type: ignore[attr-defined]
