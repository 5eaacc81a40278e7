"""Traces of a real engine, against the routing that transformers computes for each sequence."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_settings import env
from recording import wait_for
from served import engine, generate, offloaded

from vllm_moe_offload import npz
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.eviction import AdaptiveEviction
from vllm_moe_offload.trace import load_all

FAMILY = "qwen3_moe"
LIMITS = {"block_size": 32, "max_num_batched_tokens": 32, "max_num_seqs": 4, "max_model_len": 256}


def prompt(length, seed):
    return [3 + (97 * i * i + 41 * i + 29 * seed) % 509 for i in range(length)]


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint(FAMILY)


@pytest.fixture(scope="module")
def routes(path):
    """Tells the experts that transformers routes each token of a sequence to, sorted."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def of(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
        top = [layer.topk(model.config.num_experts_per_tok).indices for layer in logits]
        return np.sort(torch.stack(top, 1).numpy(), -1)

    return of


def recorded(directory):
    """Every sequence in the directory: sorted experts [T, L, K], and which are decode steps."""
    (trace,) = load_all(directory)
    cuts = trace.sequence_starts[1:-1]
    ids = np.split(np.sort(trace.expert_ids, -1), cuts)
    return list(zip(ids, np.split(trace.is_decode, cuts), strict=True))


def assert_is(found, expected, prompt_length, start=0):
    """A recorded sequence is what was computed from a position on; the last token never is."""
    ids, is_decode = found
    assert np.array_equal(ids, expected[start:-1])
    assert is_decode.tolist() == [p >= prompt_length for p in range(start, len(expected) - 1)]


def run(llm, prompts, max_tokens):
    """Whole sequences, prompts included."""
    made = generate(llm, prompts, max_tokens, logprobs=None)
    return [p + one.token_ids for p, one in zip(prompts, made, strict=True)]


def by_first_rows(found, sequences, routes):
    """Pair recorded sequences, in any order, with what they should be."""
    pairs = []
    for tokens in sequences:
        expected = routes(tokens)
        ((index, match),) = [
            (i, one) for i, one in enumerate(found) if np.array_equal(one[0][:3], expected[:3])
        ]
        pairs.append((match, expected))
        found = found[:index] + found[index + 1 :]
    assert found == []
    return pairs


@pytest.mark.parametrize("share", [0.5, 0, 1])
def test_interleaved_requests_come_apart(path, routes, tmp_path, share):
    prompts = [prompt(80, 1), prompt(5, 2), prompt(47, 3)]
    options = offloaded(cache_fraction=share, trace_path=str(tmp_path), trace_interval_s=3600)
    with engine(path, FAMILY, **LIMITS, **options) as llm:
        sequences = run(llm, prompts, 9)
    found = recorded(tmp_path)
    pairs = by_first_rows(found, sequences, routes)
    for (match, expected), given in zip(pairs, prompts, strict=True):
        assert_is(match, expected, len(given))


def test_prefix_hits_begin_in_the_middle(path, routes, tmp_path):
    common = prompt(70, 4)
    prompts = [common + prompt(9, 5), common + prompt(12, 6)]
    options = offloaded(cache_fraction=0.5, trace_path=str(tmp_path), trace_interval_s=3600)
    with engine(path, FAMILY, **LIMITS, **options, enable_prefix_caching=True) as llm:
        (first,) = run(llm, prompts[:1], 6)
        (second,) = run(llm, prompts[1:], 6)
    one, other = recorded(tmp_path)
    assert_is(one, routes(first), len(prompts[0]))
    assert_is(other, routes(second), len(prompts[1]), start=2 * LIMITS["block_size"])


def test_preempted_requests_are_recorded_once(path, routes, tmp_path, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original = Scheduler._preempt_request

    def note(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", note)
    prompts = [prompt(60, 7), prompt(58, 8)]
    options = offloaded(cache_fraction=0.5, trace_path=str(tmp_path), trace_interval_s=3600)
    limits = LIMITS | {"max_model_len": 128, "num_gpu_blocks_override": 6}
    with engine(path, FAMILY, **limits, **options, enable_prefix_caching=False) as llm:
        sequences = run(llm, prompts, 40)
    assert preempted
    pairs = by_first_rows(recorded(tmp_path), sequences, routes)
    for (match, expected), given in zip(pairs, prompts, strict=True):
        assert_is(match, expected, len(given))


def worker_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_a_restart_begins_warm(path, tmp_path):
    options = offloaded(cache_fraction=0.5, trace_path=str(tmp_path))
    prompts = [prompt(9, seed) for seed in range(4)]
    with engine(path, FAMILY, **LIMITS, **options) as llm:
        assert worker_of(llm).moe_offload_stats()["resident"] == 0
        run(llm, prompts, 12)
        (offload,) = worker_of(llm).moe_offload_engines
        learned = offload.eviction.to_arrays()
        assert learned["sequel_LEE"].any()
    with engine(path, FAMILY, **LIMITS, **options) as llm:
        (offload,) = worker_of(llm).moe_offload_engines
        found = offload.eviction.to_arrays()
        assert all((found[name] == learned[name]).all() for name in learned)
        stats = offload.stats()
        assert stats.resident == stats.slots
        assert (stats.active, stats.bytes_moved) == (0, 0)
        offload.check_integrity()
        run(llm, prompts, 12)
        offload.check_integrity()


@pytest.fixture
def asleep(monkeypatch):
    """Whether workers sleep, as those of a GPU do, and what eviction learns cannot be read."""
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
    from vllm.v1.worker.cpu_worker import CPUWorker

    asleep, to_arrays = threading.Event(), AdaptiveEviction.to_arrays

    class Backend(SleepModeBackend):
        def suspend(self, level=1):
            asleep.set()

        def resume(self, tags=None):
            asleep.clear()

        def discard(self, tags):
            """Nothing is shared here."""

    def read(self):
        assert not asleep.is_set(), "read while it was not there"
        return to_arrays(self)

    for name in ("sleep", "wake_up"):
        monkeypatch.delattr(CPUWorker, name)
    monkeypatch.setattr(CPUWorker, "sleep_mode_backend", Backend())
    monkeypatch.setattr(AdaptiveEviction, "to_arrays", read)
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    monkeypatch.setattr("torch.accelerator.get_memory_info", lambda: (1 << 30, 2 << 30))
    return asleep


def test_what_was_learned_before_a_sleep_is_saved_in_it(
    path, routes, tmp_path, asleep, monkeypatch
):
    from vllm_moe_offload.patches import recording

    said, file = [], tmp_path / "stage0.warm-start"
    monkeypatch.setattr(recording.logger, "warning", said.append)
    options = offloaded(cache_fraction=0.5, trace_path=str(tmp_path), trace_interval_s=0.5)

    def kept():
        arrays = npz.load(file, "", "") if file.exists() else {}
        return arrays.get("policy_adaptive/sequel_LEE")

    with engine(path, FAMILY, **LIMITS, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        (offload,) = worker_of(llm).moe_offload_engines
        sequences = []
        for seed in (1, 2):
            sequences += run(llm, [prompt(9, seed)], 12)
            learned = offload.eviction.to_arrays()["sequel_LEE"]
            core.sleep(level=1)
            assert asleep.is_set()
            # The worker hears of requests that have ended in a step without tokens.
            assert core.scheduler.has_requests()
            core.step_fn()
            assert not core.scheduler.has_requests()
            wait_for(lambda learned=learned: np.array_equal(kept(), learned))
            core.wake_up()
    assert said == []
    pairs = by_first_rows(recorded(tmp_path), sequences, routes)
    for match, expected in pairs:
        assert_is(match, expected, 9)


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_bad_warm_start_is_reported_and_ignored(checkpoint, tmp_path, damage, monkeypatch):
    from vllm_moe_offload.patches import recording

    said = []
    monkeypatch.setattr(recording.logger, "warning", lambda text, *args: said.append(text % args))
    path, other = checkpoint(FAMILY), checkpoint("mixtral")
    file = tmp_path / "stage0.warm-start"
    first = path if damage == "cut" else other
    family = FAMILY if damage == "cut" else "mixtral"
    options = offloaded(cache_fraction=0.5, trace_path=str(tmp_path))
    with engine(first, family, **LIMITS, **options) as llm:
        run(llm, [prompt(9, 1)], 3)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    bad = file.read_bytes()
    assert said == []
    with engine(path, FAMILY, **LIMITS, **options) as llm:
        (line,) = said
        assert f"warm start = {file}: " in line
        assert "The slots start empty" in line
        assert worker_of(llm).moe_offload_stats()["resident"] == 0
        run(llm, [prompt(9, 1)], 3)
    assert file.with_name(f"{file.name}.old").read_bytes() == bad
    with engine(path, FAMILY, **LIMITS, **options) as llm:
        assert worker_of(llm).moe_offload_stats()["resident"] > 0


def test_a_directory_that_cannot_be_written_is_refused_first(path, tmp_path, monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    monkeypatch.setattr(
        DefaultModelLoader, "load_weights", lambda *_a, **_k: pytest.fail("weights were loaded")
    )
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "below")
    with (
        pytest.raises(OffloadError, match=r"trace_path = .*cannot be written to"),
        engine(path, FAMILY, **LIMITS, **offloaded(trace_path=where)),
    ):
        pass


APART = """
import json, sys
from pathlib import Path
sys.path.insert(0, {support!r})
from served import engine, generate

if __name__ == "__main__":
    with engine(Path({path!r}), "qwen3_moe", **{kwargs!r}) as llm:
        made = generate(llm, {prompts!r}, {max_tokens}, logprobs=None)
        stats = llm.collective_rpc("moe_offload_stats")
    print("RESULT " + json.dumps([[one.token_ids for one in made], stats]))
"""


def run_apart(path, directory, prompts, max_tokens, **kwargs):
    """Do the same in a process of its own.

    Returns:
        Whole sequences, the workers' statistics and all that was printed.
    """
    script = directory / "run.py"
    support = str(Path(__file__).parents[1] / "support")
    script.write_text(
        APART.format(
            support=support, path=str(path), prompts=prompts, max_tokens=max_tokens,
            kwargs=LIMITS | kwargs,
        )
    )  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-P", script],
        env={**os.environ, **env(FAMILY, kwargs.get("tensor_parallel_size", 1))},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    made, stats = json.loads(result.stdout.rsplit("RESULT ", 1)[1].splitlines()[0])
    sequences = [given + tokens for given, tokens in zip(prompts, made, strict=True)]
    return sequences, stats, result.stdout + result.stderr


def test_two_workers_begin_warm_and_one_records(path, routes, tmp_path):
    prompts = [prompt(20, 1), prompt(6, 2)]
    traces = tmp_path / "traces"
    options = offloaded(cache_fraction=0.5, trace_path=str(traces))
    with engine(path, FAMILY, **LIMITS, **options) as llm:
        run(llm, prompts, 8)
    for file in traces.glob("*.npz"):
        file.unlink()
    sequences, stats, said = run_apart(
        path, tmp_path, prompts, 8, **options, tensor_parallel_size=2
    )
    assert said.count("are in slots") == 2
    assert all(one["resident"] == one["slots"] for one in stats)
    assert len(list(traces.glob("*.npz"))) == 1
    pairs = by_first_rows(recorded(traces), sequences, routes)
    for (match, expected), given in zip(pairs, prompts, strict=True):
        assert_is(match, expected, len(given))


def test_wrong_drafts_are_not_recorded(path, routes, tmp_path):
    prompts = [prompt(6, 9) * 5, prompt(7, 10) * 4]
    traces = tmp_path / "traces"
    options = offloaded(cache_fraction=0.5, trace_path=str(traces), trace_interval_s=3600)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    # In a process of its own: after numba has been imported vLLM 0.32 starts no engine any more.
    sequences, stats, _ = run_apart(
        path, tmp_path, prompts, 24, **options, speculative_config=drafts
    )
    assert stats[0]["active"] > 0
    pairs = by_first_rows(recorded(traces), sequences, routes)
    for ((ids, is_decode), expected), given in zip(pairs, prompts, strict=True):
        # Drafts of the very last step may be missing, and nothing else.
        assert len(expected) - 1 - 3 <= len(ids) <= len(expected) - 1
        assert np.array_equal(ids, expected[: len(ids)])
        assert is_decode.tolist() == [p >= len(given) for p in range(len(ids))]
