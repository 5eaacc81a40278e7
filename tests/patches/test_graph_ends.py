"""Where copies beside a layer must be joined, on vLLM's own types."""

import inspect

import pytest
import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_moe_offload.patches.graph_ends import spans_layers


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def within(mode: CUDAGraphMode) -> bool:
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={}, slot_mapping={}, cudagraph_runtime_mode=mode
    )
    with override_forward_context(context):
        return spans_layers()


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
def test_only_a_piecewise_graph_ends_before_the_next_layer(capturing, mode):
    assert within(mode) == (mode != CUDAGraphMode.PIECEWISE)


def test_the_second_runner_captures_whole_steps_without_a_mode():
    """Which is why no mode stands for a whole step."""
    source = inspect.getsource(CudaGraphManager.capture)
    _, captured = source.split("torch.cuda.graph(", 1)
    assert "forward_fn(CUDAGraphMode.NONE)" in captured
    assert "CUDAGraphMode.PIECEWISE" not in captured


def test_a_breakable_graph_does_not(capturing, monkeypatch):
    monkeypatch.setattr(BreakableCUDAGraphCapture, "is_active", classmethod(lambda cls: True))
    assert not within(CUDAGraphMode.FULL)


def test_a_graph_that_nobody_explains_does_not(capturing):
    assert not spans_layers()


def test_without_a_graph_streams_go_on():
    assert within(CUDAGraphMode.PIECEWISE)
