"""Whether two systems wrote the same, and where they part."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from peers.client import Reply

Replies = Mapping[int, Sequence[Reply]]
"""Answers to the same prompts by batch size."""


def agreement(reference: Replies, other: Replies) -> dict[str, Any]:
    """Compare greedy answers of the same prompts in batches of the same size.

    Token ids are compared where both systems tell them, else texts.

    Returns:
        ``same`` and ``answers``, their numbers; ``by``, what was compared; and unless all are the
        same ``first``, the earliest difference: its ``batch``, ``prompt`` and ``position``.
    """
    pairs = [
        (batch, prompt, ours, theirs)
        for batch in sorted(reference)
        for prompt, (ours, theirs) in enumerate(zip(reference[batch], other[batch], strict=True))
    ]
    by_ids = all(ours.token_ids and theirs.token_ids for _, _, ours, theirs in pairs)
    places = [
        {"position": place, "batch": batch, "prompt": prompt}
        for batch, prompt, ours, theirs in pairs
        if (place := _first_difference(ours, theirs, by_ids)) is not None
    ]
    found = {
        "by": "token ids" if by_ids else "text",
        "same": len(pairs) - len(places),
        "answers": len(pairs),
    }
    if places:
        found["first"] = min(places, key=lambda place: place["position"])
    return found


def _first_difference(ours: Reply, theirs: Reply, by_ids: bool) -> int | None:
    a: Sequence[Any] = ours.token_ids or [] if by_ids else ours.text
    b: Sequence[Any] = theirs.token_ids or [] if by_ids else theirs.text
    return next((n for n, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)
