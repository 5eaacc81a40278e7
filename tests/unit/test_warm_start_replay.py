"""A restart on a replayed trace: the first 64 decode tokens against a cache that went on.

Legend: T tokens, L layers, K choices a token, E experts.
"""

import numpy as np
import pytest
import torch
from traces import recorded, trace_of

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.resolve import resolve_torch
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.recorder import HotSet
from vllm_moe_offload.recorder.hot_set import SECTION
from vllm_moe_offload.trace import load
from vllm_moe_offload.warm_start import ModelIdentity, WarmStartFile

WINDOW = 64
SETTLE = 200
"""Tokens after which a cache no longer knows that it began empty."""

LAYOUT = ExpertLayout.pack([("w13_weight", (2, 2), torch.int8), ("w2_weight", (2, 1), torch.int8)])


class Cache:
    """The slots of an engine, without what they hold being computed with."""

    def __init__(self, trace, share):
        config = MoeOffloadConfig.parse({"cache_fraction": share})
        self.engine = OffloadEngine(config, torch.device("cpu"))
        routing = Routing(trace.num_experts, trace.top_k, tuple(range(trace.num_experts)))
        for layer in range(trace.num_layers):
            self.engine.add_layer(
                LayerSpec(str(layer), trace.num_experts, LAYOUT, Activation("silu"),
                          routing=routing)
            )  # fmt: skip
        self.engine.plan()
        self.engine.finish_loading()

    def hit_ratio(self, ids_TLK):
        """Run tokens one by one."""
        self.engine.reset_stats()
        for ids_LK in torch.from_numpy(ids_TLK.astype(np.int64)):
            for layer, ids_K in enumerate(ids_LK):
                residency = self.engine.residency(layer)
                resolve_torch(ids_K[None], residency.tables, residency.work, evict=True)
            self.engine._eviction.learn()
        return self.engine.stats().hit_ratio


def restarts(trace, share, points, path):
    """For each point a restart there: hits of the next tokens warm, cold, and without restart."""
    identity = ModelIdentity(
        trace.model,
        tuple(map(str, range(trace.num_layers))),
        (trace.num_experts,) * trace.num_layers,
        (trace.top_k,) * trace.num_layers,
    )
    found = []
    for point in points:
        window = trace.expert_ids[point : point + WINDOW]
        learnt = HotSet(trace.num_layers, trace.num_experts)
        learnt.update(trace.expert_ids[:point].astype(np.int16))
        warm, cold, steady = (Cache(trace, share) for _ in range(3))
        steady.hit_ratio(trace.expert_ids[max(0, point - SETTLE) : point])
        policy = steady.engine.eviction.to_arrays()
        WarmStartFile(path, identity).save({SECTION: learnt.section(), "policy": policy})
        sections = WarmStartFile(path, identity).load()
        restored = HotSet(trace.num_layers, trace.num_experts)
        restored.restore(sections[SECTION])
        warm.engine.fill_slots(list(restored.score_LE))
        warm.engine.eviction.from_arrays(sections["policy"])
        warm.engine.check_integrity()
        found.append([cache.hit_ratio(window) for cache in (warm, cold, steady)])
    return np.array(found).T


def conversations(seed, *, tokens=1200, layers=3, experts=128, top_k=4, length=60):
    """Sequences that share some experts and have others of their own."""
    random = np.random.default_rng(seed)
    popular = 0.7 * random.normal(size=(layers, experts))
    ids = []
    for token in range(tokens):
        if token % length == 0:
            logits = popular + 0.7 * random.normal(size=popular.shape)
        ids.append(np.argsort(-(logits + random.gumbel(size=logits.shape)), -1)[:, :top_k])
    return trace_of(np.array(ids), experts, [length] * (tokens // length))


@pytest.mark.parametrize(("seed", "share"), [(0, 0.25), (1, 0.5), (0, 0.75)])
def test_the_first_tokens_after_a_restart(seed, share, tmp_path):
    trace = conversations(seed)
    warm, cold, steady = restarts(trace, share, (600, 900, 1100), tmp_path / "warm")
    assert (warm >= 0.9 * steady).all()
    assert cold.mean() < 0.9 * steady.mean(), "the trace needs no warm start"


@pytest.mark.traces
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("deepseek-v2-lite.intent", 0.25),
        ("deepseek-v2-lite.summary", 0.125),
        ("deepseek-v2-lite.summary", 0.5),
        ("qwen3-30b-a3b.chat", 0.25),
    ],
)
def test_recorded_traces(name, share, tmp_path):
    trace = load(*recorded(name))
    points = [64] if trace.num_tokens < 1000 else [2000, 5000]
    warm, _, steady = restarts(trace, share, points, tmp_path / "warm")
    assert (warm >= 0.9 * steady).all()
