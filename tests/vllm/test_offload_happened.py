"""Proof that the experts are where the plugin says, and only there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_settings import env
from reference import PROMPTS
from served import engine, generate, offloaded

MIB = 1 << 20


@pytest.fixture(scope="module")
def llm(checkpoint):
    with engine(checkpoint("gpt_oss"), "gpt_oss", **offloaded(cache_fraction=0.5)) as llm:
        generate(llm, PROMPTS, 8, logprobs=None)
        yield llm


@pytest.fixture(scope="module")
def worker(llm):
    """The worker itself: the engine runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_slots_hold_what_the_tables_say(worker):
    (offload,) = worker.moe_offload_engines
    offload.check_integrity()
    assert offload.stats().resident > 0


def test_experts_exist_once_in_the_pool(worker):
    (offload,) = worker.moe_offload_engines
    spans = [(s.rows_EB.data_ptr(), s.rows_EB.data_ptr() + s.num_bytes)
             for s in offload.pool.segments]  # fmt: skip
    experts = {n: p for n, p in worker.get_model().named_parameters() if ".experts." in n}
    assert len(experts) == 4 * len(offload.specs)  # two weights and two biases a layer
    for name, parameter in experts.items():
        assert any(start <= parameter.data_ptr() < stop for start, stop in spans), name
    assert offload.pool.num_bytes == sum(
        spec.num_experts * spec.layout.row_bytes for spec in offload.specs
    )


def test_no_other_tensor_is_as_large_as_a_layers_experts(worker):
    import gc

    import torch

    (offload,) = worker.moe_offload_engines
    layer = min(segment.num_bytes for segment in offload.pool.segments)
    # Two layers' slots are as large as one layer's experts; the KV cache is vLLM's.
    ours = {segment.rows_EB.untyped_storage().data_ptr() for segment in offload.pool.segments}
    ours |= {offload.arena.buffer.untyped_storage().data_ptr()}
    shapes = {(s.num_experts, *t.shape) for s in offload.specs for t in s.layout.tensors
              if len(t.shape) == 2}  # fmt: skip
    for tensor in gc.get_objects():
        # On the meta device vLLM remembers what parameters are like; such a tensor has no memory.
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        if tuple(tensor.shape) in shapes:
            assert tensor.untyped_storage().data_ptr() in ours, (tensor.shape, layer)


LOAD = """
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, {support!r})
from served import engine, offloaded

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

import vllm.model_executor.model_loader.base_loader as loader
original = loader.BaseModelLoader.load_model
report = {{}}

def load_model(self, *args, **kwargs):
    report["before"] = report["peak"] = anonymous()
    done = threading.Event()
    def watch():
        while not done.wait(0.002):
            report["peak"] = max(report["peak"], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = original(self, *args, **kwargs)
    finally:
        done.set(); thread.join()
    report["dense"] = sum(p.nbytes for n, p in model.named_parameters() if ".experts." not in n)
    return model

loader.BaseModelLoader.load_model = load_model
if __name__ == "__main__":
    with engine(Path({path!r}), "qwen3_moe", **offloaded(cache_fraction=0.25)) as llm:
        (stats,) = llm.collective_rpc("moe_offload_stats")
    print("RESULT " + json.dumps(report | stats))
"""


def test_peak_memory_while_loading(checkpoint, tmp_path):
    path = checkpoint(
        "qwen3_moe", num_experts=32, hidden_size=512, intermediate_size=512, num_layers=4
    )
    script = tmp_path / "load.py"
    script.write_text(
        LOAD.format(support=str(Path(__file__).parents[1] / "support"), path=str(path))
    )
    result = subprocess.run(
        [sys.executable, "-P", script], env={**os.environ, **env("qwen3_moe")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    seen = json.loads(result.stdout.rsplit("RESULT ", 1)[1].splitlines()[0])
    chunk = 0  # 32-bit experts are in kernel format as they come
    allowed = (
        seen["pool_bytes"] + seen["slot_bytes"] + seen["staging_bytes"] + seen["dense"] + chunk
    )
    assert seen["pool_bytes"] > 350 * MIB, "the pool must outweigh the allowance"
    assert seen["peak"] - seen["before"] < allowed + 200 * MIB
