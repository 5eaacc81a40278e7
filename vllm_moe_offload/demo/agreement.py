"""Whether two servers say the same, where both round to 16 bits in places of their own.

Then tokens may part where two are as likely as each other within the rounding. They must not part
elsewhere, nor may log-probabilities before that.
"""

from collections.abc import Iterable, Iterator, Sequence

from vllm_moe_offload.demo.conversation import Answer

ROUNDING = 0.125
"""Of log-probabilities: two steps of bfloat16 at logits from 8 to 16."""


def apart(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Largest difference between answers, see ``steps_apart``."""
    return max(
        steps_apart(
            zip(mine.token_ids, mine.logprobs, strict=True),
            zip(other.token_ids, other.logprobs, strict=True),
        )
        for mine, other in zip(ours, theirs, strict=True)
    )


def steps_apart(mine: Iterable[tuple[int, float]], other: Iterable[tuple[int, float]]) -> float:
    """Largest difference of log-probabilities up to where tokens part, that step included.

    There each side names its own token; two that are as likely have log-probabilities that are as
    close.

    Args:
        mine: token and log-probability of every step.
        other: the same of another server.
    """
    return max(differences(mine, other), default=0.0)


def differences(
    mine: Iterable[tuple[int, float]], other: Iterable[tuple[int, float]]
) -> Iterator[float]:
    """The differences of which ``steps_apart`` is the largest."""
    for (my_token, my_logprob), (token, logprob) in zip(mine, other, strict=True):
        yield abs(my_logprob - logprob)
        if my_token != token:
            break
