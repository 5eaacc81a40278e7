"""Routers of vLLM under padding: which leave it out by themselves; the mask for all others."""

from types import SimpleNamespace

import pytest
import torch
from vllm import envs
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router, fused_topk_router
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_moe_offload import layer as offload_layer
from vllm_moe_offload.layer import building
from vllm_moe_offload.patches import moe_runner, padding

EXPERTS, TOP_K, TOKENS, REAL = 8, 2, 6, 4


class Router(BaseRouter):
    """Chooses what the test says."""

    routing_method_type = None

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        return router_logits.topk(self.top_k)


def running(mask_T):
    return override_forward_context(
        ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={}, is_padding=mask_T)
    )


def padded(real: int = REAL, rows: int = TOKENS):
    return torch.arange(rows) >= real


def test_the_mask_is_the_runner_s_own():
    """A CUDA graph reads the same memory in every replay."""
    mask_T = padded()
    with running(mask_T):
        assert padding.padding_of(TOKENS) is mask_T


@pytest.mark.parametrize("mask_T", [None, padded(rows=TOKENS + 2), padded(rows=2)])
def test_without_a_mask_of_these_rows(mask_T):
    with running(mask_T):
        assert padding.padding_of(TOKENS) is None


def test_outside_of_a_step():
    assert padding.padding_of(TOKENS) is None


def test_other_routers_do_not_leave_it_out():
    assert not padding.leaves_out(Router(TOP_K, EXPERTS))


def with_bias(**kwargs):
    return fused_topk_bias_router.FusedTopKBiasRouter(
        **kwargs, e_score_correction_bias=torch.zeros(EXPERTS), scoring_func="softmax"
    )


@pytest.mark.parametrize("make", [fused_topk_router.FusedTopKRouter, with_bias])
@pytest.mark.parametrize("skips", [True, False])
def test_routers_whose_kernels_leave_it_out_are_left_alone(monkeypatch, make, skips):
    """And their kernels are given the mask, in this version of vLLM too."""
    given = []
    monkeypatch.setattr(envs, "VLLM_MOE_SKIP_PADDING", skips, raising=False)
    monkeypatch.setattr(
        "vllm._custom_ops.topk_softmax", lambda *_, is_padding: given.append(is_padding)
    )
    router = make(top_k=TOP_K, global_num_experts=EXPERTS)
    assert padding.leaves_out(router) is skips
    with running(padded()):
        router.select_experts(torch.zeros(TOKENS, 4), torch.randn(TOKENS, EXPERTS))
    (mask_T,) = given
    assert torch.equal(mask_T, padded()) if skips else mask_T is None


@pytest.mark.parametrize("leaves_out", [True, False])
def test_only_offloaded_layers_behind_routers_that_keep_it(monkeypatch, leaves_out):
    monkeypatch.setattr(moe_runner, "leaves_out", lambda router: leaves_out)
    monkeypatch.setattr(offload_layer, "is_offloaded", lambda method: method.name == "offloaded")

    class MoERunner:
        _shared_experts = None

        def __init__(self, name):
            self.router = None
            self.routed_experts = SimpleNamespace(quant_method=SimpleNamespace(name=name))
            self._select_forward()

        def _select_forward(self):
            return None

    def masks(name):
        return hasattr(MoERunner(name).routed_experts.quant_method, "offload_padding")

    moe_runner.apply(SimpleNamespace(MoERunner=MoERunner))
    assert not masks("offloaded")
    with building(SimpleNamespace()):
        assert not masks("stock")
        assert masks("offloaded") is not leaves_out


def test_the_first_runner_fills_the_mask():
    runner = SimpleNamespace(is_padding=torch.zeros(8, dtype=torch.bool))
    for real in (3, 5, 2):
        mask_T = GPUModelRunner._prepare_padding_mask(runner, real, TOKENS)
        assert mask_T.data_ptr() == runner.is_padding.data_ptr()
        assert mask_T.tolist() == padded(real).tolist()
