"""What kernels ask about a GPU, of devices that are made up."""

from types import SimpleNamespace

import pytest
import torch
from formats_of_tests import FORMATS

from vllm_moe_offload.kernels import gpu
from vllm_moe_offload.kernels.quantised_tiles import quantised_tiles

CARD = torch.device("cuda", 3)


@pytest.fixture(autouse=True)
def nothing_is_known():
    asked = (gpu.has_e4m3, gpu.shared_bytes)
    yield [question.cache_clear() for question in asked]
    for question in asked:
        question.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), False), ((8, 9), True)])
def test_e4m3(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert gpu.has_e4m3(CARD) is expected


def test_shared_memory(monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert gpu.shared_bytes(CARD) == 99 * 1024


def test_a_host_is_as_good_as_any_gpu():
    host = torch.device("cpu")
    assert gpu.has_e4m3(host)
    assert gpu.shared_bytes(host) == 227 * 1024


def test_tiles_are_smaller_where_they_would_not_fit():
    """Only those of prompts whose activations are rounded inside do not."""
    for name, form in FORMATS.items():
        for pairs in (1, 128, 1024, 8192, 65536):
            sizes = (form, 128, pairs, torch.bfloat16)
            small, large = quantised_tiles(*sizes, 99 * 1024), quantised_tiles(*sizes)
            assert (small != large) == (name == "fp8 tensor" and pairs == 65536)
            assert small.block_k * 2 == large.block_k or small == large
