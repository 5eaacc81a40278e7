"""Prompts that are the same as text and as token ids."""

import random
from collections.abc import Callable, Sequence

from peers.client import Prompt

_TEXT = (
    "a mixture of experts replaces the network by many smaller ones and a router scores them all "
    "while copies are slow and recent experts stay in memory so that most tokens find theirs "
    "What is the capital of France Write short story about lighthouse keeper def return import"
)
WORDS = _TEXT.split()


def prompts(
    encode: Callable[[str], Sequence[int]], count: int, tokens: int, seed: int
) -> list[Prompt]:
    """Make different prompts of random words, all of one length.

    A kernel that is compiled for even numbers of tokens is compiled again for the first odd one.

    Args:
        encode: the checkpoint's tokenizer.
        count: how many.
        tokens: length of each; less where no word fits the rest.
        seed: another one gives other prompts.
    """
    source = random.Random(seed)
    return [_prompt(encode, tokens, source) for _ in range(count)]


def _prompt(encode: Callable[[str], Sequence[int]], tokens: int, source: random.Random) -> Prompt:
    text = source.choice(WORDS)
    # A word is at least a token, so this many are enough; then words are dropped by bisection.
    words = [text, *(source.choice(WORDS) for _ in range(tokens - 1))]
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode(" ".join(words[:middle]))) <= tokens:
            low = middle
        else:
            high = middle - 1
    text = " ".join(words[:low])
    while len(encode(text)) < tokens:
        longer = (f"{text} {word}" for word in source.sample(WORDS, len(WORDS)))
        fits = next((one for one in longer if len(encode(one)) <= tokens), None)
        if fits is None:
            break
        text = fits
    return Prompt(text, list(encode(text)))
