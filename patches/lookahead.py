"""What a step's schedule tells about this step and the next one, before the model runs.

Target: ``SchedulerOutput`` in vllm.v1.core.sched.output; read by the worker's patch.
Versions: 0.32, 0.33.
Why: a step that will stream all experts can begin to load them before its first layer, and a
    prompt that is scheduled in chunks is sure to be followed by another such step.
How: count the tokens of a step that runs outside CUDA graphs, and what is left of the prompts.
Can go: when vLLM tells its workers what is left of a prompt.
"""

from typing import Any


class Lookahead:
    """Knows the prompts of the running requests by what the scheduler has sent.

    Args:
        vllm_config: gives the largest batch that a CUDA graph takes, and that a step may have.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._graph_tokens = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._prompt_tokens: dict[str, int] = {}

    def tokens_outside_graphs(self, scheduler_output: Any) -> int:
        """Tokens of a step, 0 if it may be replayed from CUDA graphs."""
        tokens: int = scheduler_output.total_num_scheduled_tokens
        return tokens if tokens > self._graph_tokens else 0

    def next_tokens(self, scheduler_output: Any) -> int:
        """Tokens that the next step has at least, 0 if it may be replayed from CUDA graphs."""
        for request in scheduler_output.finished_req_ids:
            self._prompt_tokens.pop(request, None)
        computed = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._prompt_tokens[new.req_id] = len(new.prompt_token_ids or ())
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        left = sum(
            max(0, self._prompt_tokens.get(request, 0) - start - scheduled)
            for request, start in computed.items()
            if (scheduled := scheduler_output.num_scheduled_tokens.get(request, 0))
        )
        left = min(left, self._step_tokens)
        return left if left > self._graph_tokens else 0
