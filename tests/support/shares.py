"""Answers with several shares of the experts in slots, from one start of vLLM."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference import PROMPTS, Generation
from served import engine, generate, offloaded

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from exchange import Exchange

Answers = tuple[list[Generation], dict[str, Any]]


def by_share(
    path: Path, family: str, shares: Sequence[float], max_tokens: int, **kwargs: Any
) -> list[Answers]:
    """Generations and statistics with each share, by an engine of its own over one host pool."""
    # Later answers would reuse what attention kept of earlier ones.
    kwargs["enable_prefix_caching"] = False
    first, *others = shares
    with engine(path, family, **offloaded(cache_fraction=first), **kwargs) as llm:
        answers = [_answers(llm, max_tokens)]
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        exchange = Exchange(worker)
        for share in others:
            exchange.build({"cache_fraction": share})
            answers.append(_answers(llm, max_tokens))
    return answers


def _answers(llm: Any, max_tokens: int) -> Answers:
    generations = generate(llm, PROMPTS, max_tokens)
    (stats,) = llm.collective_rpc("moe_offload_stats")
    return generations, stats
