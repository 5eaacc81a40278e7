"""One layer, one cache size, one expert at a time: what the simulator must agree with."""

import numpy as np

from vllm_moe_offload.simulate import adaptive


class SlowLru:
    def __init__(self, experts):
        self.last, self.step = {}, 0

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


def slow_admit(resident, active, scores, slots, bypass=False):
    """The rule of replacement on sets."""
    if bypass:
        kept = set(resident | active)
        while len(kept) > slots:
            kept.remove(min(kept, key=lambda e: (scores[e], e)))
        return kept
    kept = set(resident)
    for expert in sorted(active - resident):
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
        resident = slow_admit(resident, active, scores, slots, getattr(policy, "bypass", False))
        assert len(resident) <= slots
    return hits, load_hits


class SlowAdaptive:
    """All layers of the adaptive policy, by its description."""

    def __init__(self, layers, experts, slots):
        self.layers, self.experts, self.slots = layers, experts, slots
        self.last = [[-1] * experts for _ in range(layers)]
        self.average = np.zeros((layers, experts, len(adaptive.HALF_LIVES)))
        self.before = [set() for _ in range(layers)]
        self.lru = [set() for _ in range(layers)]
        self.votes = np.zeros(1 + len(adaptive.MIXTURES))
        self.leader = self.lead = self.accesses = self.step = self.clock = 0

    def order(self, candidate, layer):
        """Experts that have been used, first the ones to keep; with their keys."""
        keys = {}
        for expert in range(self.experts):
            if self.last[layer][expert] < 0:
                keys[expert] = -1.0 if candidate == 0 else 0.0
            elif candidate == 0:
                keys[expert] = self.last[layer][expert] + expert / self.experts
            else:
                mixed = np.dot(adaptive.MIXTURES[candidate - 1], self.average[layer, expert])
                keys[expert] = mixed + (expert in self.before[layer])
        return keys

    def replay(self, steps):
        resident = [set() for _ in range(self.layers)]
        hits = 0
        for ids_TLK in steps:
            active = [set(ids_TLK[:, layer].ravel().tolist()) for layer in range(self.layers)]
            hits += sum(int(e) in resident[la] for la, e in self._pairs(ids_TLK))
            free, leader = self._free(resident), self.leader
            for layer in range(self.layers):
                self.lead += len(active[layer] & resident[layer])
                self.lead -= len(active[layer] & self.lru[layer])
                self.accesses += len(active[layer])
            self._vote(active)
            self._learn(ids_TLK, active)
            for layer in range(self.layers):
                last = dict(enumerate(self.last[layer]))
                self.lru[layer] = slow_admit(self.lru[layer], active[layer], last, self.slots)
                as_lru = {e: (e in self.lru[layer], stamp) for e, stamp in last.items()}
                scores = self.order(leader, layer) if layer in free else as_lru
                resident[layer] = slow_admit(resident[layer], active[layer], scores, self.slots)
            self.step += 1
        return hits

    def _pairs(self, ids_TLK):
        return [(la, e) for ids_LK in ids_TLK for la, ids in enumerate(ids_LK) for e in ids]

    def _free(self, resident):
        deviation = sum(len(lru - here) for lru, here in zip(self.lru, resident, strict=True))
        allowed = self.lead + adaptive.LOSS_RATE * self.accesses
        allowed += adaptive.OPENING_CREDIT * self.layers
        credit = allowed - adaptive.DEVIATION_PRICE * deviation
        turn = {la: (la + 7 * self.step) % self.layers for la in range(self.layers)}
        return {la for la in turn if turn[la] < credit / adaptive.DEVIATION_PRICE}

    def _vote(self, active):
        self.votes *= 0.5 ** (1 / adaptive.VOTE_HALF_LIFE)
        for layer in range(self.layers):
            for candidate in range(len(self.votes)):
                keys = self.order(candidate, layer)
                for expert in active[layer]:
                    above = sum(key > keys[expert] for key in keys.values())
                    seen = self.last[layer][expert] >= 0
                    self.votes[candidate] += seen and above < self.slots
        best = int(self.votes.argmax())
        margin = adaptive.SWITCH_MARGIN * self.layers
        if self.votes[best] - self.votes[self.leader] > margin:
            self.leader = best

    def _learn(self, ids_TLK, active):
        for ids_LK in ids_TLK:
            for layer, ids in enumerate(ids_LK):
                for expert in ids:
                    self.last[layer][int(expert)] = self.clock
        self.clock += 1
        fade = 0.5 ** (1 / np.array(adaptive.HALF_LIVES))
        self.average *= fade
        for layer, experts in enumerate(active):
            for expert in experts:
                self.average[layer, expert] += 1 - fade
        self.before = active
