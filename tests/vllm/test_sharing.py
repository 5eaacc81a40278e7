"""Experts that borrow from the KV cache of a real vLLM.

vLLM's CPU backend names one layout, in which the layers of a block lie apart. Its kernels address
blocks by their stride all the same, so here they are told to do so: the same scheduler, worker,
runner, cache and kernels, in the layout that experts need.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import killed
import pytest
import sharing
from cpu_settings import env, llm_kwargs
from safetensors.torch import load_file
from served import engine, offloaded
from sharing import check, core_of, poisoned_moves, prompts, serve, worker_of

from vllm_moe_offload.patches import lending

SHAPE = {"num_experts": 16, "num_layers": 4}
PROMPTS = prompts(16, 60)
TOKENS = 90
SIZES = {"block_size": 32, "kv_cache_memory_bytes": 8 << 20}


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint("qwen3_moe", **SHAPE)


@contextmanager
def layers_side_by_side():
    from vllm.v1.attention.backends import cpu_attn

    with pytest.MonkeyPatch.context() as patch:
        # Noted for being undone, then changed.
        backend = cpu_attn.CPUAttentionBackend
        patch.setattr(
            backend, "supported_kv_cache_layouts", vars(backend)["supported_kv_cache_layouts"]
        )
        sharing.let_layers_lie_side_by_side(cpu_attn)
        yield


def bytes_outside_experts(path):
    """Of a checkpoint's tensors, all of which are served in 32 bits."""
    tensors = (load_file(file) for file in path.glob("*.safetensors"))
    return sum(
        4 * tensor.numel()
        for file in tensors for name, tensor in file.items() if ".experts." not in name
    )  # fmt: skip


def settings(**options):
    return {**SIZES, **offloaded(**options)}


@contextmanager
def sharing_engine(path, **options):
    with layers_side_by_side(), engine(path, "qwen3_moe", **settings(**options)) as llm:
        yield llm


@pytest.fixture(scope="module")
def fixed_answers(path):
    with sharing_engine(path, kv_policy="fixed", kv_floor=0.8) as llm:
        (offload,) = worker_of(llm).moe_offload_engines
        assert 0 < offload.borrower.boundary.max_increments < SHAPE["num_experts"]
        answers = serve(llm, PROMPTS, TOKENS)
        check(llm)
        assert offload.borrower._follower.number == 1, "a fixed split moved"
    return answers


@pytest.fixture(scope="module")
def answers_of_an_arena(path):
    """Without any option, in the layout that the backend names: split once, with the reason."""
    with (
        mock.patch.object(lending.logger, "info") as info,
        engine(path, "qwen3_moe", **settings()) as llm,
    ):
        said = [call.args[0] % call.args[1:] for call in info.call_args_list]
        (line,) = [line for line in said if "dense weights" in line]
        assert "slots for 16 of 64 experts, KV cache of 4096 tokens, not shared: " in line
        (offload,) = worker_of(llm).moe_offload_engines
        assert "CPU_ATTN keeps the layers of a block apart" in offload.not_shared
        assert offload.budget.slots == (SHAPE["num_experts"] // 4,) * SHAPE["num_layers"]
        share = worker_of(llm).moe_offload_share()
        assert share.dense_bytes == bytes_outside_experts(path)
        assert share.slots == sum(offload.budget.slots)
        return serve(llm, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def restless(path):
    """An engine whose boundary moves in nearly every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lending, "_policy", sharing.restless)
        with sharing_engine(path) as llm:
            yield llm


def test_borrowed_slots_change_no_bit(fixed_answers, answers_of_an_arena):
    assert fixed_answers == answers_of_an_arena


def test_moves_change_no_bit(fixed_answers, restless):
    with poisoned_moves() as watch:
        answers = serve(restless, PROMPTS, TOKENS, check_every=1)
        answers_again = serve(restless, PROMPTS, TOKENS, start=100)
        check(restless)
        stats = restless.collective_rpc("moe_offload_stats")[0]
    assert answers == fixed_answers
    assert [tokens for tokens, _ in answers_again] == [tokens for tokens, _ in fixed_answers]
    assert watch.moves >= 200
    assert len(set(watch.increments)) > 8
    assert stats["misses"] > stats["slots"], "experts came back into slots that had closed"


@pytest.fixture
def sleeping(restless, monkeypatch):
    """The same engine, whose worker sleeps as one on a GPU does.

    vLLM's CPU worker refuses to. Here it has the GPU worker's methods, over a backend that spoils
    the cache where that of a GPU unmaps it, and gives back zeros as a GPU does.
    """
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
    from vllm.v1.worker.cpu_worker import CPUWorker

    buffer = worker_of(restless).moe_offload_borrowing.borrower._bytes

    class Backend(SleepModeBackend):
        def suspend(self, level: int = 1) -> None:
            buffer.fill_(sharing.POISON)

        def resume(self, tags: list[str] | None = None) -> None:
            assert bool((buffer == sharing.POISON).all()), "written to while it was not there"
            buffer.zero_()

        def discard(self, tags: tuple[str, ...]) -> None:
            assert tags == ("kv_cache",)
            self.suspend()

    for name in ("sleep", "wake_up", "discard"):
        monkeypatch.delattr(CPUWorker, name)
    monkeypatch.setattr(worker_of(restless), "_sleep_mode_backend", Backend())
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    monkeypatch.setattr("torch.accelerator.get_memory_info", lambda: (1 << 30, 2 << 30))
    return core_of(restless)


def sleep(core):
    core.sleep(level=1)


def release(core):
    core.pause_scheduler()
    while core.scheduler.has_requests() or core.batch_queue:
        core.step_fn()
    core.release_kv_cache_memory()


@pytest.mark.parametrize("fall_asleep", [sleep, release])
def test_a_cache_that_was_discarded_holds_no_expert(fixed_answers, restless, sleeping, fall_asleep):
    serve(restless, PROMPTS[:4], 8)
    (offload,) = worker_of(restless).moe_offload_engines
    assert offload.stats().resident > 0
    fall_asleep(sleeping)
    assert sleeping.is_sleeping()
    sleeping.wake_up()
    check(restless)
    answers = serve(restless, PROMPTS[:4], TOKENS)
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in fixed_answers[:4]]
    check(restless)


def test_killed_under_load_and_started_again(path):
    """With the default policy: nothing is left behind that a new engine would trip over."""
    options = {**llm_kwargs("qwen3_moe"), **SIZES, "max_model_len": 256}
    found = killed.run(path, options, env("qwen3_moe"))
    killed.check(found)


WORKERS = """
import json, sys
sys.path.insert(0, {support!r})
import sharing
from vllm_moe_offload.patches import lending, when_imported

# Worker processes run this file too, up to here.
when_imported.call("vllm.v1.attention.backends.cpu_attn", sharing.let_layers_lie_side_by_side)

if __name__ == "__main__":
    from pathlib import Path
    from served import engine, offloaded

    lending._policy = sharing.switched(6)
    prompts = sharing.prompts(10, 60)
    with engine(
        Path({path!r}), "qwen3_moe", tensor_parallel_size=2, block_size=32,
        kv_cache_memory_bytes=4 << 20, enable_prefix_caching=False, **offloaded(),
    ) as llm:
        at_rest = sharing.serve(llm, prompts, 40)
        lending = sharing.core_of(llm).scheduler.moe_offload_lending
        before = lending.lender.book.ordered
        lending._policy.moves = True
        moving = sharing.serve(llm, prompts, 40, start=100)
        shares = llm.collective_rpc("moe_offload_share")
        found = dict(
            before=before, same=at_rest == moving, moves=lending.lender.book.confirmed.number,
            slots=[share.slots for share in shares], lent=lending.lender.ledger.lent,
            boundaries=len({{share.boundary for share in shares}}),
        )
    print("RESULT " + json.dumps(found))
"""


def test_workers_of_a_group_move_together(path, tmp_path):
    script = tmp_path / "workers.py"
    support = str(Path(__file__).parents[1] / "support")
    script.write_text(WORKERS.format(support=support, path=str(path)))
    result = subprocess.run(
        [sys.executable, "-P", script], env={**os.environ, **env("qwen3_moe", 2)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    found = json.loads(result.stdout.rsplit("RESULT ", 1)[1].splitlines()[0])
    assert found["before"] == 6
    assert found["same"], "answers depend on where the boundary is"
    assert found["moves"] >= 40
    assert found["boundaries"] == 1
    assert found["slots"] == [found["lent"] * SHAPE["num_layers"]] * 2
