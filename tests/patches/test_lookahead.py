"""What the scheduler's output tells, on vLLM's own types."""

from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_moe_offload.patches.lookahead import Lookahead

GRAPH, STEP = 16, 100


def lookahead() -> Lookahead:
    return Lookahead(
        SimpleNamespace(
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=GRAPH),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=STEP),
        )
    )


def new(name: str, prompt: int, computed: int = 0) -> NewRequestData:
    return NewRequestData(
        req_id=name, prompt_token_ids=[0] * prompt, mm_features=[], sampling_params=None,
        pooling_params=None, block_ids=([],), num_computed_tokens=computed, lora_request=None,
    )  # fmt: skip


def output(scheduled: dict[str, int], fresh=(), computed=None, finished=()) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    made.num_scheduled_tokens = scheduled
    made.total_num_scheduled_tokens = sum(scheduled.values())
    made.scheduled_new_reqs = list(fresh)
    made.finished_req_ids = set(finished)
    computed = computed or {}
    made.scheduled_cached_reqs = CachedRequestData(
        req_ids=list(computed), resumed_req_ids=set(), new_token_ids=[], all_token_ids={},
        new_block_ids=[None] * len(computed), num_computed_tokens=list(computed.values()),
        num_output_tokens=[0] * len(computed),
    )  # fmt: skip
    return made


@pytest.mark.parametrize(("tokens", "outside"), [(0, 0), (1, 0), (16, 0), (17, 17), (100, 100)])
def test_steps_within_graphs(tokens, outside):
    assert lookahead().tokens_outside_graphs(output({"a": tokens})) == outside


def test_chunks_of_a_prompt():
    ahead = lookahead()
    assert ahead.next_tokens(output({"a": 100}, [new("a", 250)])) == 100
    assert ahead.next_tokens(output({"a": 100}, computed={"a": 100})) == 50
    assert ahead.next_tokens(output({"a": 50}, computed={"a": 200})) == 0
    assert ahead.next_tokens(output({"a": 1}, computed={"a": 250})) == 0


def test_prefix_cache_hits_are_not_computed_again():
    assert lookahead().next_tokens(output({"a": 100}, [new("a", 250, computed=100)])) == 50


def test_prompts_add_up():
    ahead = lookahead()
    step = output({"a": 90, "b": 10}, [new("a", 100), new("b", 20)])
    assert ahead.next_tokens(step) == 20


def test_too_little_is_left():
    assert lookahead().next_tokens(output({"a": 100}, [new("a", 116)])) == 0


def test_a_request_that_waits_or_ends_says_nothing():
    ahead = lookahead()
    ahead.next_tokens(output({"a": 10}, [new("a", 100)]))
    assert ahead.next_tokens(output({"b": 10}, [new("b", 10)])) == 0
    assert ahead.next_tokens(output({"c": 10}, [new("c", 10)], finished=["a", "b"])) == 0
    assert ahead._prompt_tokens.keys() == {"c"}


def test_embeddings_have_no_tokens_to_count():
    request = new("a", 0)
    request.prompt_token_ids = None
    assert lookahead().next_tokens(output({"a": 100}, [request])) == 0


def test_graphs_off():
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=STEP),
    )
    assert Lookahead(config).tokens_outside_graphs(output({"a": 1})) == 1
