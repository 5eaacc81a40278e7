"""Sequences out of steps, against a slow reading of the same steps, token by token.

Each id says which token of which sequence it belongs to, or that it is a draft that was wrong.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.recorder.sequences import SequenceSorter
from vllm_moe_offload.recorder.steps import RecordedStep, StepRows

EXPERTS = 500
WRONG = EXPERTS - 1


def ids_of(sequence: int, positions, wrong=()):
    """int16 [tokens, 2 layers, 2 choices]."""
    ids = np.array([[[sequence, p], [p, sequence]] for p in positions], np.int16).reshape(-1, 2, 2)
    for p in wrong:
        ids[list(positions).index(p)] = WRONG
    return ids


def block(sequence, start, count, drafts=0, wrong=()):
    positions = range(start, start + count)
    return (sequence, start, count, drafts), ids_of(sequence, positions, wrong)


def step(*blocks, begun=(), ended=(), drafts=True, positions=False):
    rows, ids = zip(*blocks, strict=True) if blocks else ((), ())
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], [], []]
    on_device = None
    if positions:
        on_device = np.concatenate([np.arange(s, s + c) for _, s, c, _ in rows])
        columns[1] = [-99] * len(rows)  # the host does not know
    return RecordedStep(
        StepRows(*columns[:3], columns[3] if drafts else None, tuple(begun), tuple(ended)),
        np.concatenate(ids) if ids else None,
        on_device,
    )


def pieces(*results):
    """What a sorter gave, by number, as lists of (sequence, position, is decode)."""
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for tokens in results:
        if tokens is None:
            continue
        for number, ids, decode in zip(
            tokens.sequence_N.tolist(), tokens.ids_NLK, tokens.is_decode_N.tolist(), strict=True
        ):
            sequence, position = ids[0].tolist()
            if ids.max() == WRONG:
                sequence = position = WRONG
            else:
                assert ids[1].tolist() == [position, sequence]
            found.setdefault(number, []).append((sequence, position, decode))
    return sorted(found.values())


def run(sequence, start, stop, prompt):
    return [(sequence, p, p >= prompt) for p in range(start, stop)]


def test_two_interleaved_requests():
    sorter = SequenceSorter(EXPERTS)
    first = sorter.add([
        step(block(0, 0, 4), begun=[(0, 6)]),
        step(block(1, 0, 3), block(0, 4, 2), begun=[(1, 3)]),
        step(block(0, 6, 1), block(1, 3, 1)),
    ])  # fmt: skip
    second = sorter.add([step(block(1, 4, 1), block(0, 7, 1)), step(ended=[0, 1])])
    assert pieces(first, second) == [run(0, 0, 8, prompt=6), run(1, 0, 5, prompt=3)]


def test_nothing():
    sorter = SequenceSorter(EXPERTS)
    assert sorter.add([]) is None
    assert sorter.add([step(begun=[(0, 3)]), step(ended=[0])]) is None
    assert sorter.finish() is None


def test_prefix_hit_begins_in_the_middle():
    sorter = SequenceSorter(EXPERTS)
    found = sorter.add([step(block(0, 16, 4), begun=[(0, 20)]), step(block(0, 20, 1))])
    assert pieces(found) == [run(0, 16, 21, prompt=20)]


def test_recomputed_positions_count_once():
    sorter = SequenceSorter(EXPERTS)
    found = [
        sorter.add([step(block(0, 0, 5), begun=[(0, 5)]), step(block(0, 5, 1))]),
        # Preempted, and computed again in two chunks of which the second adds a token.
        sorter.add([step(block(0, 0, 4)), step(block(0, 4, 3))]),
    ]
    assert pieces(*found) == [run(0, 0, 7, prompt=5)]


def test_a_dropped_step_splits():
    sorter = SequenceSorter(EXPERTS)
    dropped = step(block(0, 3, 2)).rows.without_tokens()
    found = sorter.add(
        [step(block(0, 0, 3), begun=[(0, 9)]), RecordedStep(dropped), step(block(0, 5, 2))]
    )
    assert pieces(found) == [run(0, 0, 3, 9), run(0, 5, 7, 9)]


def test_what_begins_and_ends_survives_a_dropped_step():
    sorter = SequenceSorter(EXPERTS)
    rows = step(block(0, 0, 3), begun=[(0, 3)], ended=[7]).rows.without_tokens()
    assert (rows.begun, rows.ended, list(rows.sequences_R)) == (((0, 3),), (7,), [])
    found = sorter.add([RecordedStep(rows), step(block(0, 3, 1))])
    assert pieces(found) == [run(0, 3, 4, 3)]


@pytest.mark.parametrize("positions", [False, True])
def test_wrong_drafts(positions):
    sorter = SequenceSorter(EXPERTS)
    found = [
        sorter.add([step(block(0, 0, 4), begun=[(0, 4)], positions=positions)]),
        # Of three drafts one was right, as the next step shows.
        sorter.add([step(block(0, 4, 4, 3, wrong=(6, 7)), positions=positions)]),
        sorter.add([step(block(0, 6, 3, 2), positions=positions)]),
        # All of these were right, and the last ones stay unsure for ever.
        sorter.add([step(block(0, 9, 4, 3), positions=positions), step(ended=[0])]),
    ]
    assert pieces(*found) == [run(0, 0, 10, prompt=4)]


def test_unsure_drafts_are_held_back():
    sorter = SequenceSorter(EXPERTS)
    found = sorter.add([step(block(0, 0, 2), begun=[(0, 2)]), step(block(0, 2, 3, 2))])
    assert pieces(found) == [run(0, 0, 2, 2)]
    assert pieces(sorter.add([])) == []
    assert pieces(sorter.finish()) == [run(0, 2, 3, 2)]


def test_drafts_before_a_dropped_step_are_unsure():
    sorter = SequenceSorter(EXPERTS)
    found = sorter.add([
        step(block(0, 0, 2), begun=[(0, 2)]), step(block(0, 2, 3, 2, wrong=(3, 4))),
        step(block(0, 7, 1)),
    ])  # fmt: skip
    assert pieces(found) == [run(0, 0, 3, 2), run(0, 7, 8, 2)]


def test_tokens_with_inactive_choices_are_left_out():
    sorter = SequenceSorter(EXPERTS)
    whole = step(block(0, 0, 4), begun=[(0, 9)])
    whole.ids_TLK[1, 1, 0] = -1
    whole.ids_TLK[2, 0, 1] = EXPERTS
    assert pieces(sorter.add([whole])) == [[(0, 0, False), (0, 3, False)]]
    assert sorter.incomplete == 2


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_smallest_type(experts, dtype):
    found = SequenceSorter(experts).add([step(block(0, 0, 1), begun=[(0, 1)])])
    assert found.ids_NLK.dtype == dtype


@dataclass
class Sequence:
    """A sequence as a server would run it."""

    number: int
    prompt: int
    next: int
    reach: int = 0
    """Tokens that exist: those of the prompt and those that were sampled."""
    ended: bool = False
    dropped: bool = False
    blocks: list = field(default_factory=list)

    def __post_init__(self):
        self.reach = self.prompt

    def run(self, chance):
        start = self.next
        pending = self.reach - start
        if pending > 1 or chance.random() < 0.2:  # a chunk of what exists
            count, drafts, right = chance.randint(1, max(1, pending)), 0, 0
            if count == pending:
                self.reach += 1
        else:
            count, drafts = 1, chance.randint(0, 3)
            right = chance.randint(0, drafts)
            self.reach += 1 + right
        wrong = range(start + count + right, start + count + drafts)
        self.next = start + count + right
        return block(self.number, start, count + drafts, drafts, wrong)


def traffic(chance, *, preempt, drop):
    """Steps of some sequences at once, with all that may happen to them."""
    live, steps, begun, ended = [], [], [], []
    for number in range(chance.randint(1, 5)):
        prompt = chance.randint(1, 12)
        live.append(Sequence(number, prompt, next=chance.randint(0, prompt - 1)))
        begun.append((number, prompt))
    for _ in range(chance.randint(1, 12)):
        for sequence in live:
            if preempt and chance.random() < 0.15:
                sequence.next = chance.randint(0, min(sequence.next, sequence.reach - 1))
        chosen = [sequence for sequence in live if chance.random() < 0.7]
        chance.shuffle(chosen)
        made = step(*(s.run(chance) for s in chosen), begun=begun, ended=ended,
                    positions=bool(chosen) and chance.random() < 0.3)  # fmt: skip
        if drop and chance.random() < 0.2:
            made = RecordedStep(made.rows.without_tokens())
        steps.append(made)
        over = [sequence for sequence in live if chance.random() < 0.1]
        live = [sequence for sequence in live if sequence not in over]
        begun, ended = [], [sequence.number for sequence in over]
    return [*steps, step(ended=ended)]


def read_slowly(steps):
    """The same rules, one token after the other."""
    prompts = dict(pair for step in steps for pair in step.rows.begun)
    found = []
    for number, prompt in prompts.items():
        piece, known, unsure = [], -1, []
        for recorded in steps:
            row = 0
            for place, (sequence, count) in enumerate(
                zip(recorded.rows.sequences_R, recorded.rows.counts_R, strict=True)
            ):
                if sequence == number:
                    ids = recorded.ids_TLK[row : row + count]
                    start = int(recorded.rows.starts_R[place])
                    if recorded.positions_T is not None:
                        start = int(recorded.positions_T[row])
                    if unsure and start <= unsure[-1][0] + 1:
                        kept = [pair for pair in unsure if pair[0] < start]
                    else:
                        kept = []
                    sure = count - recorded.rows.drafts_R[place]
                    for position, one in [*kept, *zip(range(start, start + sure), ids[:sure],
                                                      strict=True)]:  # fmt: skip
                        if position < known:
                            continue
                        if position > known and piece:
                            found.append(piece)
                            piece = []
                        known = position + 1
                        is_wrong = one.max() == WRONG
                        piece.append((WRONG, WRONG, position >= prompt) if is_wrong
                                     else (number, position, position >= prompt))  # fmt: skip
                    unsure = list(zip(range(start + sure, start + count), ids[sure:], strict=True))
                row += count
        if piece:
            found.append(piece)
    return sorted(found)


@given(st.integers(0, 2**32), st.booleans(), st.booleans())
def test_against_a_slow_reading(seed, preempt, drop):
    chance = random.Random(seed)
    steps = traffic(chance, preempt=preempt, drop=drop)
    sorter = SequenceSorter(EXPERTS)
    results, first = [], 0
    while first < len(steps):
        count = chance.randint(1, len(steps))
        results.append(sorter.add(steps[first : first + count]))
        first += count
    results.append(sorter.finish())
    found = pieces(*results)
    assert found == read_slowly(steps)
    if not drop:
        assert not any(WRONG in token for piece in found for token in piece), "a wrong draft"
        for piece in found:
            positions = [position for _, position, _ in piece]
            assert positions == list(range(positions[0], positions[0] + len(positions)))
        assert len({piece[0][0] for piece in found}) == len(found), "a sequence is split"
