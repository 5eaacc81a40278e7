"""One layer, one cache size, one expert at a time: what the simulator must agree with."""

import numpy as np

from vllm_moe_offload.kernels import candidates as rules


class SlowLru:
    def __init__(self, experts):
        self.last, self.step = {}, 0
        self.entry = [-expert for expert in range(experts)]

    def scores(self, tokens, resident):
        self.last |= {expert: self.step for ids in tokens for expert in ids}
        self.step += 1
        return dict(self.last)


class SlowLfu:
    def __init__(self, experts):
        self.uses = {expert: [] for expert in range(experts)}
        self.step = 0

    def scores(self, tokens, resident):
        self.step += 1
        for ids in tokens:
            for expert in ids:
                self.uses[expert].append(self.step)
        return {e: sum(0.98 ** (self.step - t) for t in uses) for e, uses in self.uses.items()}


class SlowLeastStale:
    def __init__(self, experts):
        self.came, self.before, self.step = {}, set(), 0

    def scores(self, tokens, resident):
        active = {expert for ids in tokens for expert in ids}
        for expert in active - resident:
            self.came[expert] = self.step
        self.step += 1
        scores = {e: (e in self.before, came) for e, came in self.came.items()}
        self.before = active
        return scores


class SlowBelady:
    """Needs ``future``: the sets of experts of all steps."""

    bypass = True

    def __init__(self, experts, future):
        self.experts, self.future, self.step = experts, future, 0

    def scores(self, tokens, resident):
        self.step += 1
        return {expert: -self._next_use(expert) for expert in range(self.experts)}

    def _next_use(self, expert):
        later = range(self.step, len(self.future))
        return next((s for s in later if expert in self.future[s]), len(self.future))


def slow_admit(resident, active, scores, slots, bypass=False, entry=None):
    """The rule of replacement on sets."""
    if bypass:
        kept = set(resident | active)
        while len(kept) > slots:
            kept.remove(min(kept, key=lambda e: (scores[e], e)))
        return kept
    kept = set(resident)
    entry = scores if entry is None else entry
    for expert in sorted(active - resident, key=lambda e: (entry[e], e), reverse=True):
        if len(kept) >= slots:
            victims = resident & kept - active
            if not victims:
                continue
            kept.remove(min(victims, key=lambda e: (scores[e], e)))
        kept.add(expert)
    return kept


def slow_replay(steps, policy, slots):
    """Hits, and hits among unique loads, of one layer: steps are lists of tokens' ids."""
    resident, hits, load_hits = set(), 0, 0
    for tokens in steps:
        active = {expert for ids in tokens for expert in ids}
        hits += sum(expert in resident for ids in tokens for expert in ids)
        load_hits += len(active & resident)
        scores = policy.scores(tokens, set(resident))
        bypass, entry = getattr(policy, "bypass", False), getattr(policy, "entry", None)
        resident = slow_admit(resident, active, scores, slots, bypass, entry)
        assert len(resident) <= slots
    return hits, load_hits


class SlowAdaptive:
    """All layers of the adaptive policy, by its description."""

    def __init__(self, layers, experts, slots):
        self.layers, self.experts, self.slots = layers, experts, slots
        self.last = [[-1] * experts for _ in range(layers)]
        self.average = np.zeros((layers, experts, len(rules.FADES)), dtype=np.float32)
        self.past = [[] for _ in range(layers)]
        self.sequel = np.zeros((layers, experts, experts), dtype=int)
        self.held = [[set() for _ in range(layers)] for _ in range(rules.CANDIDATES)]
        self.votes = [np.float32(0)] * rules.CANDIDATES
        self.balance = rules.OPENING_CREDIT * layers
        self.leader = rules.OPENING_LEADER
        self.step = 0
        self.more = 1
        self.by_id = [-expert for expert in range(experts)]

    def rank(self, candidate, layer, expert):
        """The higher, the longer it is kept; equal only where 13 bits of the mantissa are."""
        if candidate == rules.LRU:
            return self.last[layer][expert], expert
        mixture = [*rules.MIXTURES, rules.SEQUEL_MIXTURE][candidate - 1]
        terms = np.array(mixture, dtype=np.float32) * self.average[layer, expert]
        score = terms[0] + terms[1] + terms[2]
        if candidate == rules.SEQUEL:
            now = self.past[layer][-1] if self.past[layer] else ()
            expected = sum(self.sequel[layer, earlier, expert] for earlier in now)
            expected += len(now) * int(score * rules.SEQUEL_UNIT)
            score = np.float32(expected * rules.SEQUEL_SCALE)
        return int(score.view(np.int32)) >> rules.EXPERT_BITS, expert

    def replay(self, steps, guesses=None):
        """Hits; ``guesses`` are experts that are prefetched, for each step and layer."""
        resident = [set() for _ in range(self.layers)]
        scores = [[0] * self.experts for _ in range(self.layers)]
        hits = 0
        for number, ids_TLK in enumerate(steps):
            active = [set(ids_TLK[:, layer].ravel().tolist()) for layer in range(self.layers)]
            fetched = [
                slow_admit(here, guesses[number][layer] if guesses else set(), rank, self.slots)
                for layer, (here, rank) in enumerate(zip(resident, scores, strict=True))
            ]
            hits += sum(int(e) in fetched[la] for la, e in self._pairs(ids_TLK))
            scores, entries = self._scores(resident)
            self._count_hits(active, resident)
            self._vote(active)
            for layer in range(self.layers):
                for candidate, held in enumerate(self.held):
                    rank = [self.rank(candidate, layer, e) for e in range(self.experts)]
                    entry = self.by_id if candidate == rules.LRU else rank
                    held[layer] = slow_admit(
                        held[layer], active[layer], rank, self.slots, entry=entry
                    )
                resident[layer] = slow_admit(
                    fetched[layer], active[layer], scores[layer], self.slots, entry=entries[layer]
                )
            self._learn(active)
        return hits

    def _pairs(self, ids_TLK):
        return [(la, e) for ids_LK in ids_TLK for la, ids in enumerate(ids_LK) for e in ids]

    def _scores(self, resident):
        """What each layer evicts and lets in by, from what is known before the step."""
        lru = self.held[rules.LRU]
        deviation = sum(len(held - here) for held, here in zip(lru, resident, strict=True))
        scores, entries = [], []
        for layer in range(self.layers):
            turn = (layer + rules.STRIDE * self.step) % self.layers
            price = rules.DEVIATION_PRICE * ((1 + turn) * self.more + deviation)
            rank = [self.rank(self.leader, layer, e) for e in range(self.experts)]
            as_lru = [(e in lru[layer], last) for e, last in enumerate(self.last[layer])]
            scores.append(rank if price <= self.balance else as_lru)
            entry = self.by_id if self.leader == rules.LRU else rank
            held_first = [(e in lru[layer], -e) for e in range(self.experts)]
            entries.append(entry if price <= self.balance else held_first)
        return scores, entries

    def _count_hits(self, active, resident):
        for layer in range(self.layers):
            for held in self.held:
                if len(held[layer]) < self.slots:
                    held[layer] = set(resident[layer])
            self.balance += rules.HIT * len(active[layer] & resident[layer])
            self.balance -= rules.HIT * len(active[layer] & self.held[rules.LRU][layer])
            self.balance += rules.LOSS_RATE * len(active[layer])
        left = [
            self.slots - len(here & one)
            for here, one in zip(resident, active, strict=True)
            if len(one) > self.slots
        ]
        self.more = 1 + sum(left) // self.layers
        self.balance = min(self.balance, rules.HIT * self.layers * (self.slots + 1))

    def _vote(self, active):
        for candidate, held in enumerate(self.held):
            count = sum(len(one & here) for one, here in zip(held, active, strict=True))
            faded = self.votes[candidate] * np.float32(rules.VOTE_FADE)
            self.votes[candidate] = faded + np.float32(count)
        best = max(range(rules.CANDIDATES), key=lambda c: (self.votes[c], -c))
        margin = rules.SWITCH_MARGIN * self.layers
        if self.votes[best] - self.votes[self.leader] > margin:
            self.leader = best

    def _learn(self, active):
        for layer, experts in enumerate(active):
            for expert in range(self.experts):
                average = self.average[layer, expert]
                if self.last[layer][expert] >= 0:
                    average[:] = average * np.array(rules.FADES, dtype=np.float32)
                    average[:] = np.maximum(average, np.float32(rules.FAINT))
                if expert in experts:
                    average += np.array(rules.GAINS, dtype=np.float32)
                    self.last[layer][expert] = self.step
            self.past[layer].append(experts)
            self._learn_sequels(layer)
        self.step += 1

    def _learn_sequels(self, layer):
        past, first, last = self.past[layer], rules.SOON[0], rules.SOON[-1]
        if len(past) <= last:
            return
        for earlier in past[-1 - last]:
            for expert in range(self.experts):
                uses = sum(expert in step for step in past[first - last - 1 :])
                known = self.sequel[layer, earlier, expert]
                self.sequel[layer, earlier, expert] += (
                    rules.SEQUEL_UNIT * uses - known
                ) >> rules.SEQUEL_SHIFT
