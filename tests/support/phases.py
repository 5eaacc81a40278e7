"""A server in the time of a cost model: requests, blocks, slots, and what a step takes.

The model, after what was measured of a MoE of the shape of Qwen3-30B-A3B in 16 bits:

- A token chooses 8 of 128 experts a layer, expert ``e`` with a probability that falls with
  ``e ** -0.8``; the slots of a layer hold the most probable ones, as far as they were filled.
- A step that only decodes takes a constant, a little a token, the KV cache's bytes over the
  GPU's bandwidth, and the bytes of the experts that it has to load over PCIe, one after another.
- A step with a prompt's chunk streams every absent expert beside its computation, so it takes the
  longer of the two.
- A move takes what the scheduler needs to let go of blocks, and what the GPU needs to zero bytes.

Blocks, queue, prefix cache, admission by whole prompts and preemption of the last are vLLM's.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, pairwise

import numpy as np

from vllm_moe_offload.lending.boundary import Boundary, floor_blocks
from vllm_moe_offload.lending.controller import Ghosts, Policy, Standing
from vllm_moe_offload.lending.lender import (
    TAKEN_BLOCKS_PER_SECOND,
    ZEROED_BYTES_PER_SECOND,
    Lender,
    window,
)
from vllm_moe_offload.lending.orders import Follower

EXPERTS, CHOICES, LAYERS = 128, 8, 48
ROW_BYTES = 9_437_184
BLOCK_TOKENS, BLOCK_BYTES = 16, 48 * 16 * 2 * 4 * 128 * 2
MAX_SEQS, STEP_TOKENS = 64, 8192

PCIE, HBM = 50e9, 3e12
STEP_S, TOKEN_S = 6e-3, 0.1e-3


def boundary_for(num_blocks: int, max_model_len: int) -> Boundary:
    """The boundary of a buffer of so many blocks, with the default floor."""
    return Boundary(
        num_blocks=num_blocks,
        block_bytes=BLOCK_BYTES,
        row_bytes=(ROW_BYTES,) * LAYERS,
        floor_blocks=floor_blocks(num_blocks, -(-max_model_len // BLOCK_TOKENS), 0.1),
        most_slots=EXPERTS,
    )


@cache
def misses(num_tokens: int) -> tuple[float, ...]:
    """Experts a layer that so many tokens need beyond the most probable 0, 1, ... E."""
    probability = np.arange(1, EXPERTS + 1) ** -0.8
    probability /= probability.sum()
    active = 1 - (1 - probability) ** (CHOICES * num_tokens)
    return (*np.cumsum(active[::-1])[::-1].tolist(), 0.0)


class Blocks:
    """Blocks with a prefix cache, the coldest reused first; a ``Pool`` for the lender."""

    def __init__(self, num_blocks: int, ghosts: Ghosts) -> None:
        self.key_of: dict[int, tuple[int, int]] = {}
        self.id_of: dict[tuple[int, int], int] = {}
        self.references = dict.fromkeys(range(1, num_blocks), 0)
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.withheld: set[int] = set()
        self.ghosts = ghosts

    def allocate(self, count: int) -> list[int]:
        """Take free blocks, the lowest of the coldest."""
        ids = heapq.nsmallest(count, islice(self.free, window(count)))
        for id_ in ids:
            del self.free[id_]
            self._forget(id_)
            self.references[id_] = 1
        return ids

    def reuse(self, keys: Sequence[tuple[int, int]]) -> list[int]:
        """Take the cached blocks of the longest known prefix."""
        ids = []
        for key in keys:
            if key not in self.id_of:
                break
            ids.append(self.id_of[key])
        for id_ in ids:
            self.references[id_] += 1
            self.free.pop(id_, None)
        return ids

    def release(self, ids: Sequence[int], keys: Sequence[tuple[int, int]]) -> None:
        """Put a request's blocks back; those of full keys stay cached."""
        for index in reversed(range(len(ids))):
            id_ = ids[index]
            self.references[id_] -= 1
            if index < len(keys) and keys[index] not in self.id_of and id_ not in self.key_of:
                self.key_of[id_], self.id_of[keys[index]] = keys[index], id_
            if self.references[id_] == 0:
                self.free[id_] = None
                if id_ not in self.key_of:
                    self.free.move_to_end(id_, last=False)

    def _forget(self, id_: int) -> None:
        if key := self.key_of.pop(id_, None):
            del self.id_of[key]
            self.ghosts.dropped(key)

    def free_among(self, ids: Sequence[int], limit: int) -> list[int]:
        return [id_ for id_ in ids if id_ in self.free][:limit]

    def take(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            del self.free[id_]
            self._forget(id_)
        self.withheld.update(ids)

    def give(self, ids: Sequence[int]) -> None:
        self.withheld.difference_update(ids)
        for id_ in reversed(ids):
            self.free[id_] = None
            self.free.move_to_end(id_, last=False)

    def standing(self, lent: int, run: Sequence[int]) -> Standing:
        used = len(self.references) - len(self.withheld) - len(self.free)
        in_run = sum(id_ in self.free and id_ in self.key_of for id_ in run)
        return Standing(lent, used, min(len(self.free), len(self.key_of)), in_run)


@dataclass(eq=False)
class Request:
    """A prompt and how many tokens to answer; the text is known by its conversation."""

    conversation: int
    prompt: int
    answer: int
    computed: int = 0
    answered: int = 0
    ids: list[int] = field(default_factory=list)

    def keys(self) -> list[tuple[int, int]]:
        """Names of the full blocks of the prompt."""
        return [(self.conversation, index) for index in range(self.prompt // BLOCK_TOKENS)]


class Server:
    """Serves requests with a policy for the boundary, in modelled time."""

    def __init__(
        self, boundary: Boundary, policy: Policy, *, prompt_token_s: float = 0.03e-3
    ) -> None:
        self._prompt_token_s = prompt_token_s
        self.now = 0.0
        self.preemptions = 0
        self.longest_move_s = 0.0
        self.boundary = boundary
        self._policy = policy
        ghosts = Ghosts(len(boundary.blocks(0, boundary.max_increments)))
        self.blocks = Blocks(boundary.num_blocks, ghosts)
        self.lender = Lender(boundary, self.blocks, policy)
        self._follower = Follower(boundary)
        self.resident = 0.0
        self._miss_bytes = 0.0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def serve(self, requests: Sequence[Request], *, concurrency: int = MAX_SEQS) -> float:
        """Serve requests, so many of them at a time, and return what that took."""
        start, ahead = self.now, deque(requests)
        while ahead or self.waiting or self.running:
            while ahead and len(self.waiting) + len(self.running) < concurrency:
                self.waiting.append(ahead.popleft())
            self.step()
        return self.now - start

    def step(self) -> None:
        """Schedule and compute a step."""
        lent_before, withheld = self.lender.ledger.lent, len(self.blocks.withheld)
        self.lender.step_begins()
        taken = max(0, len(self.blocks.withheld) - withheld)
        scheduled = self._schedule()
        lent = self.lender.ledger.lent
        move_s = taken / TAKEN_BLOCKS_PER_SECOND
        move_s += (
            max(0, lent_before - lent) * self.boundary.increment_bytes / (ZEROED_BYTES_PER_SECOND)
        )
        self.longest_move_s = max(self.longest_move_s, move_s)
        if order := self.lender.step_scheduled():
            self._follower.follow(order)
        self.resident = min(self.resident, lent)
        seconds = move_s + self._compute(scheduled)
        self.now += seconds
        self._policy.step(seconds, sum(scheduled.values()))
        before = self.lender.book.confirmed.miss_bytes
        self.lender.book.file(self._follower.report(int(self._miss_bytes), PCIE))
        self._policy.missed(self.lender.book.confirmed.miss_bytes - before, PCIE)

    def _schedule(self) -> dict[Request, int]:
        budget, scheduled = STEP_TOKENS, {}
        for request in list(self.running):
            if request not in self.running or budget == 0:
                continue
            target = request.prompt + request.answered
            tokens = min(budget, max(1, target - request.computed))
            while not self._grow(request, tokens, running=True):
                victim = self.running.pop()
                self.preemptions += 1
                scheduled.pop(victim, None)
                self.blocks.release(victim.ids, victim.keys()[: victim.computed // BLOCK_TOKENS])
                victim.ids, victim.computed = [], 0
                self.waiting.appendleft(victim)
                if victim is request:
                    break
            if request in self.running:
                scheduled[request] = tokens
                budget -= tokens
        while self.waiting and budget and len(self.running) < MAX_SEQS:
            if not self._admit(self.waiting[0]):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            tokens = min(budget, request.prompt + request.answered - request.computed)
            assert self._grow(request, tokens, running=True)
            scheduled[request] = tokens
            budget -= tokens
        return scheduled

    def _admit(self, request: Request) -> bool:
        """Reuse what the cache holds, if all of the request has room."""
        keys = request.keys()[: (request.prompt - 1) // BLOCK_TOKENS]
        ids = self.blocks.reuse(keys)
        need = -(-(request.prompt + request.answered) // BLOCK_TOKENS) - len(ids)
        while len(self.blocks.free) < need:
            if not self.lender.make_room(running=False):
                self.blocks.release(ids, keys)
                return False
        request.ids, request.computed = ids, len(ids) * BLOCK_TOKENS
        lost, depth = self.blocks.ghosts.wanted(keys[len(ids) :])
        self._policy.looked_up(request.computed, lost * BLOCK_TOKENS, depth)
        return True

    def _grow(self, request: Request, tokens: int, *, running: bool) -> bool:
        need = -(-(request.computed + tokens) // BLOCK_TOKENS) - len(request.ids)
        while len(self.blocks.free) < need:
            if not self.lender.make_room(running=running):
                return False
        request.ids += self.blocks.allocate(max(0, need))
        return True

    def _compute(self, scheduled: dict[Request, int]) -> float:
        """Advance the requests, and return what the step takes."""
        tokens = sum(scheduled.values())
        context = sum(request.computed for request in scheduled)
        for request, count in scheduled.items():
            request.computed += count
            if request.computed >= request.prompt + request.answered:
                request.answered += 1
        for request in [r for r in self.running if r.answered >= r.answer]:
            self.running.remove(request)
            self.blocks.release(request.ids, request.keys())
        seconds = STEP_S + context * (BLOCK_BYTES / BLOCK_TOKENS) / HBM
        prompts = tokens > len(scheduled)
        seconds += tokens * (self._prompt_token_s if prompts else TOKEN_S)
        low = int(self.resident)
        here, there = misses(tokens)[low : low + 2] if low < EXPERTS else (0.0, 0.0)
        missing = here + (there - here) * (self.resident - low)
        bytes_moved = missing * self.boundary.increment_bytes
        self._miss_bytes += bytes_moved
        self.resident = min(self.resident + missing, self.lender.ledger.lent)
        link = bytes_moved / PCIE
        return max(seconds, link) if prompts else seconds + link


def chat(number: int, *, turns: int = 8, question: int = 300, answer: int = 300) -> list[Request]:
    """Turns of one user, each on top of the whole conversation so far."""
    ends = [turn * (question + answer) for turn in range(turns + 1)]
    return [Request(number, end + question, answer) for end, _ in pairwise(ends)]


def burst(number: int, *, users: int = 128, prompt: int = 4096) -> list[Request]:
    """Prompts of many users, of no common beginning, with answers of many lengths."""
    return [Request(number + user, prompt, 100 + user * 37 % 300) for user in range(users)]


def document(number: int, *, prompt: int = 100_000, answer: int = 400) -> list[Request]:
    """One long document."""
    return [Request(number, prompt, answer)]


def crowd(number: int, *, users: int = 36, turns: int = 4, history: int = 4000) -> list[Request]:
    """Users who take turns, each with a long conversation that the cache may hold or not."""
    return [
        Request(number + user, history + 400 * turn + 300, 40)
        for turn in range(turns)
        for user in range(users)
    ]
