"""Routers of vLLM under padding: which leave it out by themselves, and that all others do now."""

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


def select(router, mask_T):
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator)
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={}, slot_mapping={}, is_padding=mask_T
    )
    with override_forward_context(context):
        return router.select_experts(torch.zeros(TOKENS, 4), logits_TE)


def padded(real: int = REAL, rows: int = TOKENS):
    return torch.arange(rows) >= real


def test_rows_of_padding_choose_nothing():
    router, plain = (Router(TOP_K, EXPERTS) for _ in range(2))
    padding.leave_out(router)
    padding.leave_out(router)
    weight_TK, ids_TK = select(plain, None)
    found_weight_TK, found_TK = select(router, padded())
    assert torch.equal(found_TK[:REAL], ids_TK[:REAL])
    assert (found_TK[REAL:] == -1).all()
    assert found_TK.dtype == ids_TK.dtype
    assert torch.equal(found_weight_TK, weight_TK)
    assert torch.equal(select(plain, padded())[1], ids_TK)


def test_the_mask_is_read_when_it_is_used():
    """A CUDA graph reads the same memory in every replay."""
    router, mask_T = Router(TOP_K, EXPERTS), padded(0)
    padding.leave_out(router)
    assert (select(router, mask_T)[1] == -1).all()
    mask_T[:1] = False
    assert (select(router, mask_T)[1] >= 0).all(1).tolist() == [True] + [False] * (TOKENS - 1)


@pytest.mark.parametrize("mask_T", [None, padded(rows=TOKENS + 2), padded(rows=2)])
def test_without_a_mask_of_these_rows(mask_T):
    router = Router(TOP_K, EXPERTS)
    padding.leave_out(router)
    assert (select(router, mask_T)[1] >= 0).all()


def test_outside_of_a_step():
    router = Router(TOP_K, EXPERTS)
    padding.leave_out(router)
    _, ids_TK = router.select_experts(torch.zeros(TOKENS, 4), torch.randn(TOKENS, EXPERTS))
    assert (ids_TK >= 0).all()


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
    padding.leave_out(router)
    assert ("_select_experts" in vars(router)) is not skips
    select(router, padded())
    (mask_T,) = given
    assert torch.equal(mask_T, padded()) if skips else mask_T is None


def test_only_offloaded_layers(monkeypatch):
    done = []
    monkeypatch.setattr(moe_runner, "leave_out", done.append)
    monkeypatch.setattr(offload_layer, "is_offloaded", lambda method: method == "offloaded")

    class MoERunner:
        _shared_experts = None

        def __init__(self, method):
            self.router = f"router of {method}"
            self.routed_experts = SimpleNamespace(quant_method=method)
            self._select_forward()

        def _select_forward(self):
            return None

    moe_runner.apply(SimpleNamespace(MoERunner=MoERunner))
    MoERunner("offloaded")
    assert done == []
    with building(SimpleNamespace()):
        MoERunner("stock")
        MoERunner("offloaded")
    assert done == ["router of offloaded"]


def test_the_first_runner_fills_the_mask():
    runner = SimpleNamespace(is_padding=torch.zeros(8, dtype=torch.bool))
    for real in (3, 5, 2):
        mask_T = GPUModelRunner._prepare_padding_mask(runner, real, TOKENS)
        assert mask_T.data_ptr() == runner.is_padding.data_ptr()
        assert mask_T.tolist() == padded(real).tolist()
