"""Where the boundary should be: what a slot saves against what a run of blocks saves.

Both are measured in seconds saved a second.

A slot more in every layer. Misses vanish where every expert has a slot, and each slot saves less
than the one before it, so the next one saves at least the average of those that are missing:
``miss_bytes / (experts - slots) / bytes_per_second``.

A run of blocks given up. What running requests use is not for sale. Of the prefix cache the run
holds a share, and by that share it loses hits, each token of which is computed anew: an
estimate on average. Blocks won back save the hits on what had to be dropped lately (``Ghosts``,
after the ghost lists of ARC: Megiddo and Modha, FAST 2003, section III); how lately says how
many of them it takes.

Requests that wait or would be preempted are not weighed: the lender serves them at once. What
is decided here is the rest, slowly and with hysteresis: it takes a clear advantage to move, a
rest after the direction has changed, and a reserve for requests that grow.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from vllm_moe_offload.lending.boundary import NULL_BLOCKS, Boundary

INTERVAL_S = 0.02
"""Busy seconds between two decisions."""

MEMORY_S = 5.0
"""Busy seconds over which rates are averaged; idle time changes nothing."""

PEAK_S = 1.0
"""Busy seconds for which the requests' largest use of blocks is kept free for them."""

REST_S = 0.5
"""Busy seconds without lending after a request has lacked blocks."""

ADVANTAGE = 1.25
"""A move must save so many times what it costs."""

REGRET_S = 30.0
"""Busy seconds without lending after the prefix cache has won blocks back: it may lose all its
hits with the last run that they need, which an average does not show."""

STRIDE = 2
"""Increments moved by one decision that had something to weigh."""

ASSUMED_BYTES_PER_SECOND = 20e9
"""Rate of misses until it has been measured: a PCIe 4.0 link."""


class Rate:
    """Exponentially averaged amount a second of a clock that the caller keeps."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._sum = self._time = 0.0

    def add(self, now: float, amount: float) -> None:
        """Count an amount."""
        self._decay(now)
        self._sum += amount

    def per_second(self, now: float) -> float:
        """Average over the memory; from zero at the start."""
        self._decay(now)
        return self._sum / self._memory_s

    def _decay(self, now: float) -> None:
        self._sum *= math.exp((self._time - now) / self._memory_s)
        self._time = now


class PromptCost:
    """What one more token costs a step that computes a prompt.

    A step over many tokens streams all absent experts, however many tokens they are: a prefix hit
    saves its tokens' computation, not the stream. So the cost is the slope of seconds over
    tokens, by least squares over such steps, recent ones weighing more.
    """

    LEAST_TOKENS = 256
    KEPT = 0.95

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def step(self, seconds: float, tokens: int) -> None:
        """Count a step; those of few tokens say nothing."""
        if tokens < self.LEAST_TOKENS:
            return
        sums = (self._weight, self._x, self._y, self._xx, self._xy)
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._weight, self._x, self._y, self._xx, self._xy = (
            self.KEPT * old + value for old, value in zip(sums, new, strict=True)
        )

    def token_s(self) -> float:
        """Seconds a token: an upper bound as long as all steps had about as many."""
        if self._weight == 0.0:
            return 0.0
        x, y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - x * x
        if variance < (0.1 * x) ** 2:
            return y / x
        slope = (self._xy / self._weight - x * y) / variance
        return min(max(slope, 0.0), y / x)


class Ghosts:
    """Prefix-cache entries that were dropped lately and would still be there in a larger cache.

    Args:
        capacity: entries to remember; as many as all lent blocks could hold.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._dropped_at: OrderedDict[Hashable, int] = OrderedDict()
        self._drops = 0

    def dropped(self, key: Hashable) -> None:
        """Remember an entry, and forget the oldest one beyond the capacity."""
        self._drops += 1
        self._dropped_at[key] = self._drops
        self._dropped_at.move_to_end(key)
        if len(self._dropped_at) > self._capacity:
            self._dropped_at.popitem(last=False)

    def wanted(self, keys: Iterable[Hashable]) -> tuple[int, int]:
        """Look up the keys of a prompt; what is found is computed anew and forgotten.

        Returns:
            How many leading keys were dropped lately, and how many blocks more would have kept
            them all.
        """
        count = depth = 0
        for key in keys:
            dropped_at = self._dropped_at.pop(key, None)
            if dropped_at is None:
                break
            count += 1
            depth = max(depth, self._drops - dropped_at + 1)
        return count, depth

    def clear(self) -> None:
        """Forget everything."""
        self._dropped_at.clear()


@dataclass(frozen=True)
class Standing:
    """The scheduler's blocks at the time of a decision."""

    lent: int
    """Increments that are the experts' now."""
    used_blocks: int
    """Blocks that requests hold."""
    cached_blocks: int
    """Free blocks of the prefix cache, all together."""
    cached_in_run: int
    """Those of them in the way of the next increments to lend."""


class Policy(Protocol):
    """Where the boundary should be; hears what happens between its decisions."""

    gives_way: bool
    """Whether requests get blocks back when they would wait."""

    def decide(self, standing: Standing) -> int:
        """Increments that the experts should have."""

    def step(self, seconds: float, tokens: int) -> None:
        """Count a step of the model: its wall time and the tokens it computed."""

    def missed(self, num_bytes: int, bytes_per_second: float) -> None:
        """Count bytes of experts that no slot held, and note the rate at which they came."""

    def looked_up(self, hit_tokens: int, lost_tokens: int, depth: int) -> None:
        """Count prompt tokens that the prefix cache held, and those that it held until lately.

        ``depth`` is the number of blocks that would have kept the latter.
        """

    def lacked(self) -> None:
        """Note that a request lacks blocks, whether or not there are any to give back."""


class FixedPolicy:
    """Splits the buffer once, at the first step (``kv_policy=fixed``), and measures nothing.

    Args:
        increments: of the experts from then on.
    """

    gives_way = False

    def __init__(self, increments: int) -> None:
        self._increments = increments

    def decide(self, standing: Standing) -> int:
        """See ``Policy``."""
        return self._increments

    def step(self, seconds: float, tokens: int) -> None:
        """See ``Policy``."""

    def missed(self, num_bytes: int, bytes_per_second: float) -> None:
        """See ``Policy``."""

    def looked_up(self, hit_tokens: int, lost_tokens: int, depth: int) -> None:
        """See ``Policy``."""

    def lacked(self) -> None:
        """See ``Policy``."""


class AutoPolicy:
    """Weighs slots against blocks (``kv_policy=auto``).

    Args:
        boundary: the arithmetic.
    """

    gives_way = True

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._now = 0.0
        self._decide_at = 0.0
        self._lend_at = 0.0
        self._misses, self._hits = Rate(), Rate()
        self._lost, self._depths = Rate(), Rate()
        self._bytes_per_second = ASSUMED_BYTES_PER_SECOND
        self._prompts = PromptCost()
        self._peaks: deque[tuple[float, int]] = deque()
        self._granted_blocks = 0
        self._wish: int | None = None

    def step(self, seconds: float, tokens: int) -> None:
        """See ``Policy``."""
        self._now += seconds
        self._prompts.step(seconds, tokens)

    def missed(self, num_bytes: int, bytes_per_second: float) -> None:
        """See ``Policy``."""
        self._misses.add(self._now, num_bytes)
        if bytes_per_second > 0:
            self._bytes_per_second = bytes_per_second

    def looked_up(self, hit_tokens: int, lost_tokens: int, depth: int) -> None:
        """See ``Policy``."""
        self._hits.add(self._now, hit_tokens)
        # What was dropped before the cache grew may be missed until it has come back once.
        if depth > self._granted_blocks:
            self._lost.add(self._now, lost_tokens)
            self._depths.add(self._now, lost_tokens * (depth - self._granted_blocks))

    def lacked(self) -> None:
        """See ``Policy``."""
        self._lend_at = max(self._lend_at, self._now + REST_S)
        self._wish = None

    def decide(self, standing: Standing) -> int:
        """See ``Policy``."""
        most, least = self._most(standing), self._boundary.min_increments
        if self._wish is not None and standing.lent > max(self._wish, least):
            return self._wish  # a step gives back no more than a few
        if self._now >= self._decide_at:
            self._decide_at = self._now + INTERVAL_S
            self._wish = self._weigh(standing, most)
            return self._wish
        return standing.lent if self._wish is None else min(self._wish, most)

    def _weigh(self, standing: Standing, most: int) -> int:
        lent = standing.lent
        slot = self._slot_value(lent)
        back = self._increments_wanted(lent)
        if back and self._blocks_value() > ADVANTAGE * slot * back:
            self._lend_at = self._now + REGRET_S
            self._granted_blocks += back * self._run_blocks
            self._lost, self._depths = Rate(), Rate()
            return lent - back
        if lent >= most or self._now < self._lend_at:
            return lent
        loss = self._run_value(standing)
        if slot <= ADVANTAGE * loss and loss > 0.0:
            return lent
        self._granted_blocks = 0
        return min(most, lent + STRIDE) if loss > 0.0 else most

    def _slot_value(self, lent: int) -> float:
        """Seconds that one more slot a layer saves a second."""
        missing = self._boundary.most_slots - lent
        if missing <= 0:
            return 0.0
        return self._misses.per_second(self._now) / missing / self._bytes_per_second

    def _run_value(self, standing: Standing) -> float:
        """Seconds a second that the next run's prefix-cache blocks save now."""
        if standing.cached_in_run == 0:
            return 0.0
        share = standing.cached_in_run / max(1, standing.cached_blocks)
        return self._hits.per_second(self._now) * min(1.0, share) * self._prompts.token_s()

    def _blocks_value(self) -> float:
        """Seconds a second that blocks won back would have saved."""
        return self._lost.per_second(self._now) * self._prompts.token_s()

    def _increments_wanted(self, lent: int) -> int:
        """Increments that would have kept what the prefix cache lost lately, 0 for none."""
        lost = self._lost.per_second(self._now)
        room = lent - self._boundary.min_increments
        if lost == 0.0 or room == 0:
            return 0
        blocks = self._depths.per_second(self._now) / lost
        return min(room, math.ceil(blocks / self._run_blocks))

    @property
    def _run_blocks(self) -> int:
        """Blocks of an increment, rounded up."""
        return -(-self._boundary.increment_bytes // self._boundary.block_bytes)

    def _most(self, standing: Standing) -> int:
        """Increments that leave requests what they lately used, and a run to grow into."""
        while self._peaks and self._peaks[0][0] < self._now - PEAK_S:
            self._peaks.popleft()
        while self._peaks and self._peaks[-1][1] <= standing.used_blocks:
            self._peaks.pop()
        self._peaks.append((self._now, standing.used_blocks))
        boundary, lent = self._boundary, standing.lent
        kept = NULL_BLOCKS + self._peaks[0][1]
        # A run more than they used: lending to the last block would take it back at the next.
        kept += self._run_blocks
        most = lent
        while most < boundary.max_increments and boundary.first_block(most + 1) >= kept:
            most += 1
        return most
