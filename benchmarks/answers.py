"""What a tiny engine answers, step by step, and where two runs of it part."""

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_moe_offload.demo.agreement import differences

MAX_TOKENS = 16
BATCHES = (1, 7, 32)
LONG_PROMPT, CHUNK = 2048, 1024


def prompt(length: int, salt: int = 0) -> list[int]:
    """Token ids that repeat late and differ by length and salt."""
    return [3 + (97 * i * i + 41 * i + 29 * length + 53 * salt) % 500 for i in range(length)]


def phases() -> dict[str, list[list[int]]]:
    """Prompts that run together, by name; the long one is prefilled in chunks."""
    lengths = (3, 8, 17, 90, 5, 31, 12)
    batches = {
        f"batch {size}": [prompt(lengths[i % len(lengths)], i) for i in range(size)]
        for size in BATCHES
    }
    return {**batches, f"prompt of {LONG_PROMPT}": [prompt(LONG_PROMPT)]}


def plugin(share: float) -> dict[str, Any]:
    """Arguments of an engine with this share of the experts in slots."""
    return {"plugin": "moe-offload", "moe_offload": {"cache_fraction": share}}


def generate(path: Path, **kwargs: Any) -> dict[str, Any]:
    """Start an engine, run all phases and take it down.

    Returns:
        ``answers``: by phase, for each request the (token, log-probability) of every step.
        ``schedule``: by phase, for each step of the engine the tokens of its requests.
        ``facts``: what the engine says of itself.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    start = time.perf_counter()
    llm = LLM(
        str(path),
        max_model_len=LONG_PROMPT + 2 * MAX_TOKENS,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.1,  # several of these share a GPU
        **kwargs,
    )
    core = llm.llm_engine.engine_core.engine_core
    steps = _record_schedule(core.scheduler)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    answers, schedule = {}, {}
    for name, prompts in phases().items():
        steps.clear()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [r.outputs[0] for r in llm.generate(requests, sampling, use_tqdm=False)]
        answers[name] = [
            [(t, step[t].logprob) for t, step in zip(o.token_ids, o.logprobs, strict=True)]
            for o in outputs
        ]
        schedule[name] = list(steps)
    facts = _facts(core.model_executor.driver_worker.worker) if "plugin" in kwargs else {}
    facts["cudagraph_mode"] = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    vars(llm).clear()
    gc.collect()
    cleanup_dist_env_and_memory()
    facts["seconds"] = round(time.perf_counter() - start, 1)
    return {"answers": answers, "schedule": schedule, "facts": facts}


def _record_schedule(scheduler: Any) -> list[list[int]]:
    """Note how many tokens every request gets in every step, largest first."""
    steps: list[list[int]] = []
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if output.num_scheduled_tokens:
            steps.append(sorted(output.num_scheduled_tokens.values(), reverse=True))
        return output

    scheduler.schedule = schedule
    return steps


def _facts(worker: Any) -> dict[str, Any]:
    """Check the engine inside its worker; the worker is in this process."""
    import torch

    (engine,) = worker.moe_offload_engines
    engine.check_integrity()
    stats = engine.stats()
    facts = {"model_runner": type(worker.model_runner).__module__, **stats.as_dict()}
    if engine.device.type == "cuda":
        mapped = [engine.pool.device_rows(s, engine.device) for s in engine.pool.segments]
        facts["pool_pinned"] = all(segment.rows_EB.is_pinned() for segment in engine.pool.segments)
        facts["pool_mapped"] = all(
            rows.is_cuda and torch.equal((rows + 0).cpu(), segment.rows_EB)
            for rows, segment in zip(mapped, engine.pool.segments, strict=True)
        )
    return facts


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any] | None:
    """First answer of two runs that is not the same to the last bit, None if all are.

    First means the earliest phase, in it the earliest step, in it the first request.
    """
    for phase, requests in mine["answers"].items():
        pairs = list(zip(requests, theirs["answers"][phase], strict=True))
        unequal = [_first(a, b) for a, b in pairs]
        found = [(step, request) for request, step in enumerate(unequal) if step is not None]
        if found:
            step, request = min(found)
            (token, logprob), (other, other_logprob) = (side[step] for side in pairs[request])
            return {
                "phase": phase,
                "step": step,
                "request": request,
                "tokens": [token, other],
                "logprob_difference": other_logprob - logprob,
                "requests_that_differ": len(found),
                "same_schedule": mine["schedule"][phase] == theirs["schedule"][phase],
            }
    return None


def _first(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if tuple(x) != tuple(y)), None
    )


def tokens_of(run: dict[str, Any]) -> list[int]:
    """All tokens of a run, one after the other."""
    return [
        token for requests in run["answers"].values() for steps in requests for token, _ in steps
    ]


def of_both(mine: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The steps of each request in two runs of all phases."""
    for phase, requests in other["answers"].items():
        yield from zip(mine["answers"][phase], requests, strict=True)


def mean_apart(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """Mean difference of log-probabilities, of each request up to where tokens part, that included.

    At that step each side names its own token.
    """
    return fmean(d for steps in of_both(mine, other) for d in differences(*steps))


def until_tokens_part(stock: dict[str, Any], mine: dict[str, Any]) -> float:
    """Largest difference of log-probabilities, of each request up to where the tokens part."""
    worst = 0.0
    for ours, theirs in of_both(mine, stock):
        for (our_token, a), (their_token, b) in zip(ours, theirs, strict=True):
            if our_token != their_token:
                break
            worst = max(worst, abs(a - b))
    return worst
