"""Whether two servers say the same, where both round to 16 bits in places of their own.

Then tokens may part where two are as likely as each other within the rounding. They must not part
elsewhere, nor may log-probabilities before that.
"""

from collections.abc import Sequence

from vllm_moe_offload.demo.conversation import Answer

ROUNDING = 0.125
"""Of log-probabilities: two steps of bfloat16 at logits from 8 to 16."""


def apart(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Largest difference of log-probabilities up to where tokens part, that step included.

    There each side names its own token; two that are as likely have log-probabilities that are as
    close.
    """
    return max(_apart(*pair) for pair in zip(ours, theirs, strict=True))


def _apart(mine: Answer, other: Answer) -> float:
    worst = 0.0
    steps = zip(mine.token_ids, mine.logprobs, other.token_ids, other.logprobs, strict=True)
    for my_token, my_logprob, token, logprob in steps:
        worst = max(worst, abs(my_logprob - logprob))
        if my_token != token:
            break
    return worst
