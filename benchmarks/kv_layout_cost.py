"""What it costs attention that the layers of a KV block lie together.

FlashAttention as vLLM's backend calls it, for decode steps over paged keys and values whose blocks
are in random order, all layers of a model one after the other in one CUDA graph. Both layouts are
views of the same memory.

Legend: L layers, B blocks, N tokens of a block, H heads of keys and values, D head size, C both
heads of a token, 2 D.
"""

import random
import statistics
from typing import Any

import torch
from torch import Tensor

LAYERS, N, HEADS, H, D = 16, 16, 32, 4, 128
CASES = ((1, 4096), (32, 4096), (1, 32_768), (32, 32_768))
"""Sequences of a step, and tokens that each has."""

ROUNDS, REPLAYS = 7, 20


def measure_layouts(*, tiny: bool) -> list[dict[str, Any]]:
    """Time a step's attention in both layouts; nothing without a GPU."""
    if tiny or not torch.cuda.is_available():
        return []
    rows = []
    blocks = max(batch * context for batch, context in CASES) // N
    memory = torch.empty(blocks * LAYERS * N * H * 2 * D, dtype=torch.bfloat16, device="cuda")
    caches = layouts(memory.normal_(), blocks)
    for batch, context in CASES:
        graphs = {name: _graph(cache, batch, context) for name, cache in caches.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        # In turns, so that whatever changes meanwhile meets both.
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                times[name].append(_seconds(graph))
        rows.append({"batch": batch, "context": context, **row_of(times)})
    return rows


def layouts(memory: Tensor, blocks: int) -> dict[str, Tensor]:
    """View memory as a cache in both layouts, each [L, B, N, H, 2 D], keys before values."""
    return {
        "layers outermost": memory.view(LAYERS, blocks, N, H, 2 * D),
        "blocks outermost": memory.view(blocks, LAYERS, N, H, 2 * D).transpose(0, 1),
    }


def random_pages(batch: int, context: int, blocks: int) -> Tensor:
    """Blocks of each sequence in no order, int32 [batch, pages], none of them twice."""
    ids, pages = list(range(blocks)), context // N
    random.Random(batch * context).shuffle(ids)
    return torch.tensor(ids[: batch * pages], dtype=torch.int32).view(batch, pages)


def row_of(times: dict[str, list[float]]) -> dict[str, Any]:
    """The medians of both layouts' rounds, and what the one costs over the other."""
    seconds = {name: statistics.median(found) for name, found in times.items()}
    cost = seconds["blocks outermost"] / seconds["layers outermost"]
    return {"case": "layout", "cost": cost, "seconds": seconds}


def _graph(cache_LBNHC: Tensor, batch: int, context: int) -> torch.cuda.CUDAGraph:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    table = random_pages(batch, context, cache_LBNHC.shape[1]).cuda()
    query = torch.randn(batch, HEADS, D, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(query)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")

    def step() -> None:
        for layer_BNHC in cache_LBNHC:
            key, value = layer_BNHC.split(D, dim=-1)
            flash_attn_varlen_func(
                q=query, k=key, v=value, out=out, cu_seqlens_q=starts, max_seqlen_q=1,
                seqused_k=lengths, max_seqlen_k=context, softmax_scale=D**-0.5, causal=True,
                block_table=table, fa_version=get_flash_attn_version(), num_splits=32,
            )  # fmt: skip

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / REPLAYS
