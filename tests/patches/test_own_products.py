"""Methods built without a backend of vLLM."""

import importlib
from types import SimpleNamespace

import pytest

from vllm_moe_offload.patches import own_products
from vllm_moe_offload.patches.wrapping import PatchError

FUNCTIONS = [
    (name, module, function)
    for name, modules in own_products._SELECTORS.items()
    for module, functions in modules.items()
    for function in functions
]


def config(name):
    return SimpleNamespace(get_name=lambda: name)


@pytest.mark.parametrize(("name", "path", "function"), FUNCTIONS)
def test_functions_are_replaced_and_put_back(name, path, function):
    module = importlib.import_module(path)
    original = getattr(module, function)
    with own_products.own_products(config(name)):
        backend, kernel = getattr(module, function)()
    assert kernel is None
    assert backend.name in ("NONE", "EMULATION")
    assert getattr(module, function) is original


def test_functions_are_put_back_after_an_error():
    from vllm.model_executor.layers.quantization import fp8

    original = fp8.select_fp8_moe_backend

    def build():
        with own_products.own_products(config("fp8")):
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert fp8.select_fp8_moe_backend is original


def test_channels_of_compressed_tensors():
    """Their method refuses all backends but one."""
    backend, kernel = own_products._wna16(quant_config=SimpleNamespace(strategy="channel"))
    assert (backend.name, kernel) == ("MARLIN", None)


@pytest.mark.parametrize("quant_config", [None, config("something else")])
def test_nothing_is_replaced_without_need(quant_config):
    with own_products.own_products(quant_config):
        pass


def test_function_that_moved(monkeypatch):
    moved = {"fp8": {"types": ("select_fp8_moe_backend",)}}
    monkeypatch.setattr(own_products, "_SELECTORS", moved)
    with (
        pytest.raises(PatchError, match="types has no select_fp8_moe_backend"),
        own_products.own_products(config("fp8")),
    ):
        pass
