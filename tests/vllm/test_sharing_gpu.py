"""Experts that borrow from the KV cache on a GPU, with vLLM's default options.

One engine serves the same requests twice, first with the boundary at rest and then with one that
moves in nearly every step, so that both runs share compiled code and graphs.
"""

import gc
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import killed
import pytest
import sharing
import torch
from cpu_settings import env
from serving import MAX_TOKENS, complete, started
from sharing import check, core_of, poisoned_moves, prompts, serve, worker_of

from vllm_moe_offload.patches import lending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

if torch.cuda.is_available():
    # What the tests here are about is compiled and replayed from graphs.
    os.environ.pop("TORCHDYNAMO_DISABLE", None)

SHAPE = {
    "num_experts": 32, "top_k": 4, "hidden_size": 512, "intermediate_size": 256, "num_layers": 4,
}  # fmt: skip
PROMPTS = prompts(40, 120) + prompts(4, 1900) + prompts(8, 400)
"""Short ones, ones of several chunks, which are swept, and some in between."""
TOKENS = 120
GRAPHS = [1, 2, 4, 8, 16, 32, 64]
SPLIT = 12
"""Slots of a layer while the boundary rests."""


@pytest.fixture(scope="module")
def llm(checkpoint):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with mock.patch.object(lending, "_policy", sharing.switched(SPLIT)):
        llm = LLM(
            str(checkpoint("qwen3_moe", **SHAPE)), dtype="bfloat16", max_model_len=2048,
            max_num_batched_tokens=512, max_num_seqs=64, enable_prefix_caching=False,
            kv_cache_memory_bytes=256 << 20, gpu_memory_utilization=0.05,
            compilation_config={"cudagraph_capture_sizes": GRAPHS}, plugin="moe-offload",
        )  # fmt: skip
    yield llm
    vars(llm).clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def replays(monkeypatch):
    counted = []
    replay = torch.cuda.CUDAGraph.replay

    def counting(self):
        counted.append(self)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counting)
    return counted


def test_the_cache_is_shared_and_graphs_are_full(llm):
    (offload,) = worker_of(llm).moe_offload_engines
    boundary = offload.borrower.boundary
    config = llm.llm_engine.vllm_config
    assert config.cache_config.kv_cache_layout == "BLNHC"
    assert config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert config.scheduler_config.async_scheduling
    assert boundary.max_increments == SHAPE["num_experts"]
    assert 0 < boundary.min_increments < SPLIT
    check(llm)


def test_no_step_of_any_size_compiles_a_kernel(llm):
    """Of the plugin; in prompts of every length up to a step's most tokens, one after the other."""
    from triton import knobs
    from vllm import SamplingParams

    most = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    params = SamplingParams(max_tokens=1, detokenize=False)
    late, before = [], knobs.runtime.jit_post_compile_hook

    def note(*_, **event):
        late.append(f"{event['fn'].module}.{event['fn'].name}")

    knobs.runtime.jit_post_compile_hook = note
    try:
        for tokens in range(1, most + 1):
            prompt = {"prompt_token_ids": [1 + n % 50 for n in range(tokens)]}
            llm.generate(prompt, params, use_tqdm=False)
        llm.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], params)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert [name for name in late if "moe_offload" in name] == []


def test_moves_change_no_bit(llm, replays):
    policy = core_of(llm).scheduler.moe_offload_lending._policy
    with poisoned_moves() as rest:
        at_rest = serve(llm, PROMPTS, TOKENS, check_every=50)
    assert len(replays) > 200, "few steps were replayed from graphs"
    policy.moves = True
    with poisoned_moves() as watch:
        moving = serve(llm, PROMPTS, TOKENS, check_every=10, start=1000)
        again = serve(llm, PROMPTS, TOKENS, start=2000)
    check(llm)
    assert rest.moves <= 1
    assert watch.moves >= 200
    assert len(set(watch.increments)) > 16
    assert moving == at_rest
    assert again == at_rest


def test_moves_hold_up_no_step(llm):
    """On the device; 100 moves over the whole range, one after the other."""
    (offload,) = worker_of(llm).moe_offload_engines
    borrower = offload.borrower
    follower, boundary = borrower._follower, borrower.boundary
    order, seconds = sharing.order_after(follower), []
    ends = (boundary.min_increments, boundary.max_increments)
    before = borrower.increments
    for number in range(100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        borrower.follow(order(ends[number % 2]))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    borrower.follow(order(before))
    sharing.adopt(core_of(llm).scheduler.moe_offload_lending.lender.book, follower)
    assert sorted(seconds)[50] < 0.005, f"{sorted(seconds)[50] * 1e3:.1f} ms"


def test_killed_under_load_and_started_again(checkpoint):
    """With the default policy: nothing is left behind that a new engine would trip over."""
    graphs = {
        # Without Inductor, which takes longest at a start.
        "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 4, 16],
    }  # fmt: skip
    options = {
        "dtype": "bfloat16", "max_model_len": 256, "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 4 << 20, "compilation_config": graphs,
    }  # fmt: skip
    path = checkpoint("qwen3_moe", num_experts=16, num_layers=4)
    killed.check(killed.run(path, options, env("qwen3_moe")))


def test_a_server_without_options_of_the_plugin(checkpoint, tmp_path):
    """It says how memory is split, and serves more than what experts leave it at first."""
    options = ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.05")
    with (
        started(
            checkpoint("olmoe"), tmp_path / "log", *options, offload=(), kv_bytes=4 << 20
        ) as server,
        ThreadPoolExecutor(24) as clients,
    ):
        server.wait_until_healthy()
        assert "are lent" in server.log, server.log[-4000:]
        answers = list(clients.map(partial(complete, server.url), range(96)))
        assert all(len(answer) == MAX_TOKENS for answer in answers)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0, server.log[-4000:]
