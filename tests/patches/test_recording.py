"""Whose rows a step ran, for what either model runner leaves behind."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.patches import recording
from vllm_moe_offload.patches.recording import Recording, RequestTable


def new_request(name, prompt=4, computed=0, **fields):
    values = {"prompt_token_ids": list(range(prompt))} | fields
    return NewRequestData(
        req_id=name, mm_features=[], sampling_params=None, pooling_params=None, block_ids=(),
        num_computed_tokens=computed, lora_request=None, **values,
    )  # fmt: skip


def scheduled(tokens, *, new=(), cached=(), drafts=None, finished=()):
    """A step: tokens by request, new requests, cached ones with what they have computed."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = dict(tokens)
    output.total_num_scheduled_tokens = sum(tokens.values())
    output.scheduled_new_reqs = list(new)
    output.scheduled_cached_reqs = CachedRequestData.make_empty()
    output.scheduled_cached_reqs.req_ids = [name for name, _ in cached]
    output.scheduled_cached_reqs.num_computed_tokens = [count for _, count in cached]
    output.scheduled_spec_decode_tokens = {
        name: [7] * count for name, count in (drafts or {}).items()
    }
    output.finished_req_ids = set(finished)
    return output


def first_runner(rows, *, state=None):
    """As vLLM's first model runner after a step; its arrays are longer than the batch."""
    starts = np.full(8, -99, np.int32)
    starts[: len(rows)] = [start for _, start in rows]
    batch = SimpleNamespace(
        req_ids=[name for name, _ in rows], num_reqs=len(rows), num_computed_tokens_cpu=starts
    )
    return SimpleNamespace(input_batch=batch, execute_model_state=state)


def second_runner(rows, positions):
    batch = SimpleNamespace(
        req_ids=[name for name, _ in rows],
        num_computed_tokens_np=np.array([start for _, start in rows]),
        positions=torch.tensor([*positions, -99, -99]),  # padded
    )
    return SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=batch))


def check(rows, sequences, starts, counts):
    assert list(rows.sequences_R) == sequences
    assert list(rows.starts_R) == starts
    assert list(rows.counts_R) == counts


@pytest.mark.parametrize("runner", ["first", "second"])
def test_rows_are_in_the_batch_s_order(runner):
    def ran(rows, positions):
        return first_runner(rows) if runner == "first" else second_runner(rows, positions)

    table = RequestTable(drafts=False)
    step = scheduled({"a": 3, "b": 5}, new=[new_request("a", 9), new_request("b", 5, computed=2)])
    rows, positions = table.rows(ran([("b", 2), ("a", 0)], range(8)), step, None)
    check(rows, [1, 0], [2, 0], [5, 3])
    assert rows.begun == ((0, 9), (1, 5))
    assert rows.drafts_R is None
    assert positions is None

    step = scheduled({"a": 6, "b": 1}, cached=[("a", 3), ("b", 7)])
    rows, _ = table.rows(ran([("a", 3), ("b", 7)], range(7)), step, None)
    check(rows, [0, 1], [3, 7], [6, 1])
    assert rows.begun == ()


def test_rows_are_kept_as_they_were():
    runner = first_runner([("a", 0)])
    step = scheduled({"a": 3}, new=[new_request("a")])
    rows, _ = RequestTable(drafts=False).rows(runner, step, None)
    runner.input_batch.num_computed_tokens_cpu[0] = 77
    runner.input_batch.req_ids[0] = "z"
    check(rows, [0], [0], [3])


def test_finished_requests():
    table = RequestTable(drafts=False)
    table.rows(first_runner([("a", 0)]), scheduled({"a": 3}, new=[new_request("a")]), None)
    # The name comes again in the very step that ends its first bearer.
    step = scheduled({"a": 2}, new=[new_request("a", 2)], finished=["a", "never seen"])
    rows, _ = table.rows(first_runner([("a", 0)]), step, None)
    check(rows, [1], [0], [2])
    assert (rows.ended, rows.begun) == ((0,), ((1, 2),))
    rows, _ = table.rows(first_runner([("a", 0)]), scheduled({}, finished=["a"]), None)
    check(rows, [], [], [])
    assert rows.ended == (1,)


def test_resumed_requests_go_on():
    """The second runner gets a request that was preempted as a new one again."""
    table = RequestTable(drafts=False)
    table.rows(first_runner([("a", 0)]), scheduled({"a": 4}, new=[new_request("a")]), None)
    step = scheduled({"a": 6}, new=[new_request("a", prefill_token_ids=list(range(6)))])
    rows, _ = table.rows(second_runner([("a", 0)], range(6)), step, None)
    check(rows, [0], [0], [6])
    assert rows.begun == ()


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"prompt_token_ids": None, "prompt_embeds": torch.zeros(7, 3)}, 7),
        ({"prompt_token_ids": None}, 0),
    ],
)
def test_prompts_without_tokens(fields, length):
    step = scheduled({"a": 1}, new=[new_request("a", **fields)])
    rows, _ = RequestTable(drafts=False).rows(first_runner([("a", 0)]), step, None)
    assert rows.begun == ((0, length),)
    assert vars(new_request("a")).keys() >= {"prompt_token_ids", "prompt_embeds"}


def test_drafts():
    table = RequestTable(drafts=True)
    step = scheduled({"a": 3, "b": 1}, new=[new_request("a"), new_request("b")], drafts={"a": 2})
    rows, positions = table.rows(second_runner([("a", 9), ("b", 5)], [7, 8, 9, 5]), step, None)
    assert list(rows.drafts_R) == [2, 0]
    # The host of the second runner takes all drafts of the step before for right.
    assert positions.tolist() == [7, 8, 9, 5]
    rows, positions = table.rows(first_runner([("a", 7), ("b", 5)]), step, None)
    check(rows, [0, 1], [7, 5], [3, 1])
    assert list(rows.drafts_R) == [2, 0]
    assert positions is None


def test_a_runner_that_ran_less_than_it_was_told():
    told = scheduled({"a": 4}, new=[new_request("a")], drafts={"a": 3})
    ran = scheduled({"a": 2}, new=[new_request("a")], drafts={"a": 1})
    runner = first_runner([("a", 0)], state=SimpleNamespace(scheduler_output=ran))
    rows, _ = RequestTable(drafts=True).rows(runner, told, None)
    check(rows, [0], [0], [2])
    assert list(rows.drafts_R) == [1]


def test_a_pooling_model_of_the_second_runner():
    runner = SimpleNamespace(execute_model_state=None)
    output = SimpleNamespace(model_runner_output=SimpleNamespace(req_ids=["b", "a"]))
    table = RequestTable(drafts=False)
    table.rows(first_runner([("a", 0)]), scheduled({"a": 2}, new=[new_request("a")]), None)
    step = scheduled({"a": 2, "b": 3}, new=[new_request("b", computed=1)], cached=[("a", 2)])
    rows, positions = table.rows(runner, step, output)
    check(rows, [1, 0], [1, 2], [3, 2])
    assert positions is None


def test_the_runners_have_what_is_read():
    import vllm.v1.worker.gpu.model_runner as second
    import vllm.v1.worker.gpu_model_runner as first
    from vllm.v1.worker.gpu.async_utils import AsyncPoolingOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu_input_batch import InputBatch as FirstInputBatch

    assert {"req_ids", "num_computed_tokens_np", "positions"} <= set(InputBatch.__annotations__)
    assert "input_batch" in second.ExecuteModelState._fields
    assert "scheduler_output" in first.ExecuteModelState._fields
    assert "scheduler_output" not in second.ExecuteModelState._fields
    source = inspect.getsource(FirstInputBatch)
    assert all(name in source for name in ("num_computed_tokens_cpu ", "def req_ids", "num_reqs"))
    assert "self.input_batch =" in inspect.getsource(first.GPUModelRunner)
    assert "self.input_batch =" not in inspect.getsource(second.GPUModelRunner)
    assert "self.model_runner_output = " in inspect.getsource(AsyncPoolingOutput)


class FakeRecorder:
    def __init__(self):
        self.recorded, self.closed = [], 0

    def record(self, rows, num_tokens, positions_T):
        self.recorded.append((rows, num_tokens, positions_T))

    def close(self):
        self.closed += 1


def made(recorder) -> Recording:
    made = object.__new__(Recording)
    made._requests, made._recorder = RequestTable(drafts=False), recorder
    return made


def test_a_step_is_recorded():
    recorder = FakeRecorder()
    step = scheduled({"a": 3}, new=[new_request("a")])
    made(recorder).note(first_runner([("a", 0)]), step, None)
    ((rows, num_tokens, positions),) = recorder.recorded
    check(rows, [0], [0], [3])
    assert (num_tokens, positions) == (3, None)


def test_a_step_that_cannot_be_read_ends_the_recording_only(monkeypatch):
    lines = []
    monkeypatch.setattr(recording.logger, "exception", lines.append)
    recorder = FakeRecorder()
    broken = made(recorder)
    for _ in range(2):
        broken.note(SimpleNamespace(), scheduled({"a": 3}, new=[new_request("a")]), None)
    assert recorder.recorded == []
    assert recorder.closed == 1
    assert len(lines) == 1


def test_a_worker_without_a_recorder():
    quiet = made(None)
    quiet.note(None, None, None)
    quiet.settle()
    quiet.close()


@pytest.mark.parametrize(
    ("options", "rank", "is_target", "expected"),
    [
        ({"trace_path": "somewhere"}, 0, True, 512),
        ({"trace_path": "somewhere"}, 1, True, 0),
        ({"trace_path": "somewhere"}, 0, False, 0),
        ({}, 0, True, 0),
    ],
    ids=["first", "second worker", "draft model", "off"],
)
def test_who_logs(options, rank, is_target, expected, monkeypatch):
    from vllm_moe_offload.config import MoeOffloadConfig

    monkeypatch.setattr(recording, "get_tensor_model_parallel_rank", lambda: rank)
    model = object()
    config = SimpleNamespace(
        model_config=model, scheduler_config=SimpleNamespace(max_num_batched_tokens=512)
    )
    asked = model if is_target else object()
    parsed = MoeOffloadConfig.parse(options)
    assert recording.tokens_to_log(config, asked, parsed) == expected
    assert "log_tokens" in inspect.signature(OffloadEngine).parameters
