"""When the log-sums of contrastive_lse need a running maximum: one rule for every backend."""

# exp(-48) / a million clips keeps all its bits in fp32, as does exp(48) * a million.
# Unit vectors stay within it at temperatures from 1/48 up.
MAX_BOUND = 48.0


def needs_running_max(bound: float | None) -> bool:
    """Whether exp(score), or a sum of it over millions, might leave fp32.

    So it is if there is no bound on |score|, or one beyond ``MAX_BOUND``; nan is no bound.
    """
    return bound is None or not bound <= MAX_BOUND
