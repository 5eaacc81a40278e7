"""One vLLM engine in a process of its own, timed step by step. Called by ``run.py``.

Routing is uniform over the first ``limit`` experts, drawn inside the step on the device, so that
it changes with every replay of a CUDA graph.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from shapes import SHAPES, Shape

STRATEGY = "uniform-over-some"


def register_routing() -> Any:
    """Register the routing strategy; returns it, for its limit to be set."""
    import torch
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

    class UniformOverSome(simulator.RoutingStrategy):  # type: ignore[misc]
        def __init__(self) -> None:
            self.limit: torch.Tensor | None = None

        @torch.inference_mode()
        def confine(self, limit: int) -> None:
            assert self.limit is not None, "nothing has been routed yet"
            self.limit.fill_(limit)

        def route_tokens(
            self, hidden_states: Any, router_logits: Any, top_k: int, indices_type: Any = None
        ) -> tuple[Any, Any]:
            tokens, experts = router_logits.shape
            device = router_logits.device
            if self.limit is None:
                self.limit = torch.tensor(experts, device=device)
            scores = torch.rand(tokens, experts, device=device)
            excluded = torch.arange(experts, device=device) >= self.limit
            ids = scores.masked_fill(excluded, -1.0).topk(top_k, dim=-1).indices
            weights = torch.full((tokens, top_k), 1 / top_k, device=device)
            return weights, ids.to(indices_type or torch.int32)

    strategy = UniformOverSome()
    simulator.RoutingSimulator.register_strategy(STRATEGY, strategy)
    return strategy


def fill_dummies_quickly() -> None:
    """Give all experts of a layer the same dummy weights: drawing them on the host takes long."""
    from vllm.model_executor.model_loader import dummy_loader

    original = dummy_loader.initialize_single_dummy_weight

    def initialize(parameter: Any, *args: Any, **kwargs: Any) -> None:
        if parameter.device.type == "cpu" and parameter.ndim == 3:
            original(parameter[:1], *args, **kwargs)
            parameter.data[1:].copy_(parameter.data[:1].expand_as(parameter.data[1:]))
        else:
            original(parameter, *args, **kwargs)

    dummy_loader.initialize_single_dummy_weight = initialize


class Server:
    """An ``LLM`` whose steps are taken one at a time."""

    def __init__(self, folder: Path, shape: Shape, job: dict[str, Any]) -> None:
        from vllm import LLM

        self._shape = shape
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=job["max_model_len"],
            max_num_batched_tokens=job["chunk"],
            max_num_seqs=max(job["batches"]),
            **job["settings"],
        )
        self._requests = 0

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        self._requests += 1
        self.llm.llm_engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)

    def _finish(self) -> None:
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def _prompt(self, length: int) -> list[int]:
        return [(7 * i + 3 * self._requests) % (self._shape.vocabulary - 8) for i in range(length)]

    def _stats(self) -> dict[str, int] | None:
        (stats,) = self.llm.collective_rpc("moe_offload_stats")
        return stats

    def decode(self, batch: int, steps: int, offloaded: bool) -> dict[str, Any]:
        """Mean time of a decode step and the bytes that it moved."""
        warm_up = 8
        for _ in range(batch):
            self._add(self._prompt(4), steps + warm_up + 8)
        for _ in range(warm_up):
            self.llm.llm_engine.step()
        before = self._stats() if offloaded else None
        start = time.perf_counter()
        for _ in range(steps):
            self.llm.llm_engine.step()
        seconds = (time.perf_counter() - start) / steps
        row = {"case": "decode", "batch": batch, "seconds": seconds}
        row |= _moved(before, self._stats() if offloaded else None, steps)
        self._finish()
        return row

    def prefill(self, tokens: int, repeats: int, offloaded: bool) -> dict[str, Any]:
        """Median time to the first token of one long prompt and the bytes that it moved."""
        times = []
        for repeat in range(repeats + 1):
            if repeat == 1:
                before = self._stats() if offloaded else None
            self._add(self._prompt(tokens), 1)
            start = time.perf_counter()
            self._finish()
            times.append(time.perf_counter() - start)
        row = {"case": "prefill", "tokens": tokens, "seconds": statistics.median(times[1:])}
        return row | _moved(before, self._stats() if offloaded else None, repeats)


def _moved(before: Any, after: Any, steps: int) -> dict[str, float]:
    if before is None or after is None:
        return {}
    active = after["active"] - before["active"]
    return {
        "bytes": (after["bytes_moved"] - before["bytes_moved"]) / steps,
        "hit_ratio": (after["hits"] - before["hits"]) / max(1, active),
    }


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the cases of one configuration."""
    strategy = register_routing()
    fill_dummies_quickly()
    shape = SHAPES[job["shape"]]
    server = Server(shape.write(Path(job["folder"])), shape, job)
    offloaded = "plugin" in job["settings"]
    rows = [server.prefill(tokens, job["repeats"], offloaded) for tokens in job["prefills"]]
    for batch in job["batches"]:
        rows.append(server.decode(batch, job["steps"], offloaded))
    if confined := job.get("confined"):
        strategy.confine(confined)
        server.decode(max(job["batches"]), 30, offloaded)  # until the residents are those
        for batch in (1, 8):
            rows.append({**server.decode(batch, job["steps"], offloaded), "confined": confined})
    for row in rows:
        print(json.dumps({"configuration": job["name"], **row}), flush=True)
    return rows


def main() -> int:
    """Read a job, write its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = STRATEGY
    args.out.write_text(json.dumps(run(json.loads(args.job.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
