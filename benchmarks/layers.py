"""What do the MoE layers alone cost, and what bounds them? Without vLLM's runner around them.

    python benchmarks/layers.py --out benchmarks/results/layers.json

Layers of Qwen3-30B-A3B's shape out of the host pool, uniform routing. Decode steps are one CUDA
graph over all layers; the prefill is the sweep. Beside each figure stand the PCIe rate of this
run and the time of vLLM's own kernel with all experts on the GPU.
"""

import argparse
import json
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(repeats):
        if DEVICE.type == "cpu":
            times.append(timeit.timeit(run, number=1))
            continue
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def build(num_layers: int, share: float) -> Any:
    """An engine with dummy weights, all slots empty."""
    from vllm_moe_offload.config import MoeOffloadConfig
    from vllm_moe_offload.engine import OffloadEngine
    from vllm_moe_offload.kernels.activation import Activation
    from vllm_moe_offload.layout import ExpertLayout
    from vllm_moe_offload.offloaded_layer import LayerSpec

    layout = ExpertLayout.pack(
        [
            ("w13_weight", (2 * INTERMEDIATE, HIDDEN), torch.bfloat16),
            ("w2_weight", (HIDDEN, INTERMEDIATE), torch.bfloat16),
        ]
    )
    engine = OffloadEngine(MoeOffloadConfig.parse({"cache_fraction": share}), DEVICE)
    for number in range(num_layers):
        spec = LayerSpec(str(number), EXPERTS, layout, Activation("silu"), tiles=tiles)
        engine.add_layer(spec)
    engine.plan()
    row = (torch.randn(layout.row_bytes // 2) * 0.02).to(torch.bfloat16).view(torch.uint8)
    for segment in engine.pool.segments:
        segment.rows_EB.copy_(row.expand_as(segment.rows_EB))
    engine.finish_loading()
    return engine


def tiles(num_tokens: int) -> Any:
    """Look up vLLM's tiles for the shape."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    from vllm_moe_offload.kernels.expert_mlp import TileConfig

    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    return TileConfig.from_table(try_get_optimal_moe_config(*shapes, TOP_K, None, num_tokens))


def uniform(num_layers: int, tokens: int) -> torch.Tensor:
    """Ids [L, T, K], drawn without replacement."""
    scores = torch.rand(num_layers, tokens, EXPERTS, device=DEVICE)
    return scores.topk(TOP_K, dim=-1).indices.int()


def graphed(step: Callable[[], Any]) -> Any:
    """Capture a step for ``replay``; a CPU has no graphs and repeats it."""
    if DEVICE.type == "cpu":
        return SimpleNamespace(replay=step)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def copy_rate() -> float:
    """Bytes a second of pinned copies of 9 MiB pieces."""
    piece = 9 << 20
    host = torch.empty(64, piece, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(64, piece, dtype=torch.uint8, device=DEVICE)

    def run() -> None:
        for source, target in zip(host, device, strict=True):
            target.copy_(source, non_blocking=True)

    return host.numel() / seconds(run, 5)


def gather_rates(engine: Any) -> dict[str, float]:
    """GB/s of the gather kernel by number of rows and of programs."""
    from vllm_moe_offload.kernels.gather import gather

    segment = engine.pool.segments[0]
    source = engine.pool.device_rows(segment, DEVICE)
    target = torch.empty(96, source.shape[1], dtype=torch.uint8, device=DEVICE)
    rates = {}
    for rows in (1, 8, 96):
        index = torch.randperm(EXPERTS, device=DEVICE)[:rows].int()
        length = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
        for programs in (16, 32, 64, 128):

            def run(index=index, length=length, programs=programs) -> None:
                gather(source, target, index, None, length, programs=programs)

            run()
            rates[f"{rows} rows, {programs} programs"] = (
                rows * source.shape[1] / seconds(run, 7) / 1e9
            )
    return rates


def stock_step(num_layers: int, tokens: int) -> float:
    """Time of vLLM's kernel over layers whose experts are all on the GPU."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    options = {"dtype": torch.bfloat16, "device": DEVICE}
    w1 = [torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, **options) for _ in range(num_layers)]
    w2 = [torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, **options) for _ in range(num_layers)]
    x = torch.randn(tokens, HIDDEN, **options)
    weight = torch.full((tokens, TOP_K), 1 / TOP_K, device=DEVICE)
    ids = uniform(num_layers, tokens)

    def step() -> None:
        for layer in range(num_layers):
            fused_experts(x, w1[layer], w2[layer], weight, ids[layer])

    step()
    if tokens > 512:
        return seconds(step)
    graph = graphed(step)
    return seconds(graph.replay, 20)


def among_residents(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    """Map uniform ids [L, T, K] to the experts that have a slot, still without replacement."""
    layers = ids.shape[0]
    held = torch.stack(
        [engine.residency(layer).tables.expert_of_S.sort().values for layer in range(layers)]
    ).long()
    choice = torch.rand(*ids.shape[:2], held.shape[1], device=DEVICE).topk(TOP_K).indices
    return held[torch.arange(layers, device=DEVICE)[:, None, None], choice].int()


def offloaded_step(engine: Any, tokens: int, *, confined: bool = False) -> dict[str, float]:
    """Time and bytes of steps with fresh uniform routing, over all experts or the residents."""
    layers = len(engine.specs)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.full((tokens, TOP_K), 1 / TOP_K, device=DEVICE)
    ids = uniform(layers, tokens)

    def step() -> None:
        for layer in range(layers):
            engine.run(layer, x, weight, ids[layer])

    step()
    run = step if tokens > 512 else graphed(step).replay
    times = []
    for repeat in range(14):
        fresh = uniform(layers, tokens)
        ids.copy_(among_residents(engine, fresh) if confined else fresh)
        if repeat == 4:
            torch.cuda.synchronize()
            engine.reset_stats()
        times.append(seconds(run, 1))
    stats = engine.stats()
    return {
        "seconds": sum(times[4:]) / 10,
        "bytes": stats.bytes_moved / 10,
        "hit_ratio": stats.hit_ratio,
    }


def resolve_time(engine: Any, tokens: int) -> float:
    """Seconds a layer of resolve and of a gather that has nothing to do, all experts in slots.

    An engine whose experts all have slots needs no policy, so the tables here are others, which
    tell the policy what each step reads.
    """
    from vllm_moe_offload.eviction import AdaptiveEviction
    from vllm_moe_offload.kernels.dispatch import Dispatch
    from vllm_moe_offload.kernels.resolve import ResidencyTables, WorkList

    ids = uniform(1, tokens)[0]
    part = engine._layers[0]
    order = AdaptiveEviction([EXPERTS], [EXPERTS], DEVICE, part.operations).order(0)
    tables = ResidencyTables.empty(EXPERTS, EXPERTS, DEVICE, order)
    work, do = WorkList.empty(EXPERTS, DEVICE), part.operations
    lists = None
    if do.sorts_pairs:
        lists = Dispatch.empty(ids.numel(), EXPERTS, tiles(tokens).block_m, DEVICE)

    def step() -> None:
        for _ in range(50):
            do.resolve(ids, tables, work, evict=True, dispatch=lists)
            do.gather(part.pool_rows_EB, part.slots.rows_RB, work.load_expert_E,
                      work.load_slot_E, work.num_loads)  # fmt: skip

    return seconds(graphed(step).replay, 5) / 50


def learn_time(num_layers: int) -> float:
    """Seconds a step of what eviction learns from it, a quarter of the experts in slots."""
    from vllm_moe_offload.eviction import AdaptiveEviction
    from vllm_moe_offload.kernels.operations import operations_for
    from vllm_moe_offload.kernels.resolve import Use

    experts, slots = [EXPERTS] * num_layers, [EXPERTS // 4] * num_layers
    eviction = AdaptiveEviction(experts, slots, DEVICE, operations_for(DEVICE))
    use = Use.ACTIVE * (torch.rand(num_layers, EXPERTS, device=DEVICE) < TOP_K / EXPERTS)

    def note() -> None:
        for _ in range(50):
            eviction.tables.use_LE.copy_(use)

    def note_and_learn() -> None:
        for _ in range(50):
            eviction.tables.use_LE.copy_(use)
            eviction.learn()

    # Learning clears the notes, so that they are written anew each time, which is no part of it.
    times = [seconds(graphed(run).replay, 5) for run in (note_and_learn, note)]
    return (times[0] - times[1]) / 50


def main() -> int:
    """Measure everything and write one file."""
    from machine import provenance

    args = parse(sys.argv[1:])

    result: dict[str, Any] = provenance(args.commit)
    rates = [copy_rate()]
    tokens = (8192, 1, 8, 32, 128)  # the prefill first: it fills the slots
    result["stock_seconds"] = stock = {t: stock_step(args.layers, t) for t in tokens}
    print(json.dumps(result), flush=True)
    rows = []
    for share in (1.0, 0.5, 0.25):
        torch.cuda.empty_cache()
        engine = build(args.layers, share)
        if share == 1.0:
            result["gather_gb_s"] = gather_rates(engine)
            print(json.dumps(result["gather_gb_s"]), flush=True)
        cases = [(count, False) for count in tokens]
        if share == 0.5:
            cases += [(1, True), (8, True)]
        for count, confined in cases:
            row = {"share": share, "tokens": count, "confined_to_residents": confined}
            row |= offloaded_step(engine, count, confined=confined)
            rates.append(copy_rate())
            rows.append(row)
            print(json.dumps(row), flush=True)
        if share == 1.0:
            result["resolve_gather_us"] = {t: resolve_time(engine, t) * 1e6 for t in (1, 8, 32)}
            result["learn_us"] = {count: learn_time(count) * 1e6 for count in (16, 48)}
            print(json.dumps([result["resolve_gather_us"], result["learn_us"]]), flush=True)
        engine.check_integrity()
        engine.close()
        del engine
    # The link's rate wanders by some percent: the bound is the best of all that was seen.
    result["copy_gb_s"] = {"best": max(rates) / 1e9, "worst": min(rates) / 1e9}
    for row in rows:
        bound, resident = row["bytes"] / max(rates), stock[row["tokens"]]
        row["moved_gb_s"] = row["bytes"] / row["seconds"] / 1e9
        row["stock_seconds"], row["copy_bound_seconds"] = resident, bound
        row["to_stock"] = row["seconds"] / resident
        row["of_sum_bound"] = (resident + bound) / row["seconds"]
        row["of_max_bound"] = max(resident, bound) / row["seconds"]
    args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--layers", type=int, default=16)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
