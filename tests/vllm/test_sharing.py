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

import pytest
import sharing
from cpu_settings import env
from served import engine, offloaded
from sharing import check, poisoned_moves, prompts, serve, worker_of

from vllm_moe_offload.patches import lending

SHAPE = {"num_experts": 16, "num_layers": 4}
PROMPTS = prompts(16, 60)
TOKENS = 90


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


def settings(**options):
    return {"block_size": 32, "kv_cache_memory_bytes": 8 << 20, **offloaded(**options)}


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
    with engine(path, "qwen3_moe", **settings()) as llm:
        (offload,) = worker_of(llm).moe_offload_engines
        assert "CPU_ATTN keeps the layers of a block apart" in offload.not_shared
        assert offload.budget.slots == (SHAPE["num_experts"] // 4,) * SHAPE["num_layers"]
        return serve(llm, PROMPTS, TOKENS)


def test_borrowed_slots_change_no_bit(fixed_answers, answers_of_an_arena):
    assert fixed_answers == answers_of_an_arena


def test_moves_change_no_bit(path, fixed_answers, monkeypatch):
    monkeypatch.setattr(lending, "_policy", sharing.restless)
    with poisoned_moves() as watch, sharing_engine(path) as llm:
        answers = serve(llm, PROMPTS, TOKENS, check_every=1)
        answers_again = serve(llm, PROMPTS, TOKENS, start=100)
        check(llm)
        stats = llm.collective_rpc("moe_offload_stats")[0]
    assert answers == fixed_answers
    assert [tokens for tokens, _ in answers_again] == [tokens for tokens, _ in fixed_answers]
    assert watch.moves >= 200
    assert len(set(watch.increments)) > 8
    assert stats["misses"] > stats["slots"], "experts came back into slots that had closed"


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
