"""Traces for tests: random ones, and the recorded ones where they are present."""

from pathlib import Path

import numpy as np
import pytest

from vllm_moe_offload.trace import Trace

_FOLDER = Path(__file__).parents[3] / "shared" / "traces"


def recorded(*names: str) -> list[Path]:
    """Files of recorded traces, all that there are without names; skips the test without them."""
    paths = [_FOLDER / f"{name}.npz" for name in names] or sorted(_FOLDER.glob("*.npz"))
    if not paths or not all(path.is_file() for path in paths):
        pytest.skip("the recorded traces are not here")
    return paths


def trace_of(ids_TLK, num_experts, lengths=None):
    ids = np.asarray(ids_TLK, dtype=np.uint16)
    lengths = [len(ids)] if lengths is None else lengths
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Trace(ids, starts, num_experts, model="test", source="made here")


def random_trace(seed, *, tokens=40, layers=3, experts=8, top_k=2, sequences=3, skew=1.0):
    """Routed ids of drifting popularity, K different experts a token."""
    random = np.random.default_rng(seed)
    logits = skew * random.normal(size=(layers, experts))
    ids = []
    for _ in range(tokens):
        logits += 0.3 * skew * random.normal(size=logits.shape)
        ids.append(np.argsort(-(logits + random.gumbel(size=logits.shape)), -1)[:, :top_k])
    cuts = np.sort(random.integers(0, tokens + 1, sequences - 1))
    lengths = np.diff(np.concatenate([[0], cuts, [tokens]]))
    return trace_of(np.array(ids), experts, lengths)
