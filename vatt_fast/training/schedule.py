"""Learning rate by step: linear warm-up, then a cosine from the peak to the final rate."""

import math
from typing import Literal

Schedule = Literal["quarter_cosine", "half_cosine"]


def learning_rate(
    step: int,
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule = "quarter_cosine",
) -> float:
    """Rate of step ``step``, from 0.

    It is 0 at the start, ``peak`` after the warm-up, ``final`` at ``total_steps``. quarter_cosine
    falls ever faster (paper section 4.1); half_cosine is flat at both ends (the released code).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "quarter_cosine":
        share = math.cos(math.pi / 2 * progress)
    elif schedule == "half_cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    else:
        raise ValueError(f"schedule is {schedule!r}; it is quarter_cosine or half_cosine")
    return final + (peak - final) * share
