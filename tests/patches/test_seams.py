"""How seams are applied, and the small ones among them."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload import layer as offload_layer
from vllm_moe_offload import patches
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.layer import building
from vllm_moe_offload.patches import moe_runner, routed_experts, when_imported
from vllm_moe_offload.patches.wrapping import PatchError


def test_installed_vllm_is_what_the_patches_expect():
    for target in patches.SEAMS.values():
        importlib.import_module(target)
        assert target not in when_imported._pending
    patches.require_all()


def test_installing_again_does_nothing(monkeypatch):
    assert patches._installed
    monkeypatch.setattr(when_imported, "call", lambda *_: pytest.fail("asked again"))
    patches.install()


@pytest.mark.parametrize("lacks", ["class", "method"])
def test_seam_that_does_not_fit(monkeypatch, lacks):
    monkeypatch.setattr(patches, "_failures", [])
    module = SimpleNamespace(__name__="vllm.somewhere")
    if lacks == "method":
        module.MoERunner = type("MoERunner", (), {})
    patches._apply("moe_runner", module)
    with pytest.raises(PatchError) as error:
        patches.require_all()
    message = str(error.value)
    assert ("vllm.somewhere differs" if lacks == "class" else "_select_forward") in message
    assert "MoERunner" in message
    assert "Install a tested version of vLLM, or drop --plugin moe-offload" in message


def test_seam_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(patches, "_failures", [])
    patches._apply("no_such_seam", SimpleNamespace(__name__="vllm.somewhere"))
    with pytest.raises(PatchError, match="no_such_seam"):
        patches.require_all()


def engine(**options):
    return SimpleNamespace(config=MoeOffloadConfig.parse(options))


@pytest.fixture
def swap(monkeypatch):
    """Asks a layer for its method; what is handed to the engine is noted."""
    swapped = []
    monkeypatch.setattr(offload_layer, "offload", lambda *args: swapped.append(args))
    monkeypatch.setattr(offload_layer, "offload_quantised", lambda *args: swapped.append(args))
    monkeypatch.setattr(offload_layer, "is_quantised", lambda _: False)

    class RoutedExperts:
        def _get_quant_method(self, prefix, quant_config, moe_config):
            return "method of vLLM"

    routed_experts.apply(SimpleNamespace(RoutedExperts=RoutedExperts))

    def ask(prefix: str, quant_config=None, moe_config=None):
        moe_config = moe_config or SimpleNamespace(device=torch.device("cpu"))
        assert RoutedExperts()._get_quant_method(prefix, quant_config, moe_config) == (
            "method of vLLM"
        )
        return swapped

    return ask


def test_no_swap_outside_of_an_offloaded_model(swap):
    assert swap("model.layers.3.mlp.experts") == []


@pytest.mark.parametrize("quantised", [False, True])
def test_swap(swap, monkeypatch, quantised):
    current, config = engine(), SimpleNamespace(get_name=lambda: "fp8")
    monkeypatch.setattr(offload_layer, "is_quantised", lambda _: quantised)
    with building(current):
        ((*swapped,),) = swap("model.layers.3.mlp.experts", config)
    assert swapped[:3] == ["method of vLLM", current, "model.layers.3.mlp.experts"]
    assert len(swap("model.layers.3.mlp.experts")) == 1


@pytest.mark.parametrize(
    ("prefix", "chosen"),
    [
        ("model.layers.3.mlp.experts", True),
        ("language_model.model.layers.3.block_sparse_moe.experts", True),
        ("model.layers.4.mlp.experts", False),
        ("model.layers.13.mlp.experts", False),
    ],
)
def test_only_the_layers_that_were_named(swap, prefix, chosen):
    with building(engine(layers="0-1,3")):
        assert len(swap(prefix)) == chosen


@pytest.mark.parametrize(
    ("device", "backend", "decomposed"), [("cuda", "triton", True), ("cpu", "auto", True)]
)
def test_backend_whose_weights_can_be_cut(swap, device, backend, decomposed):
    config = SimpleNamespace(
        device=SimpleNamespace(type=device),
        in_dtype=torch.float32,
        moe_backend="auto",
        require_decomposed_backend=False,
    )
    swap("model.layers.3.mlp.experts", moe_config=config)
    assert (config.moe_backend, config.require_decomposed_backend) == ("auto", False)
    with building(engine()):
        swap("model.layers.3.mlp.experts", moe_config=config)
    assert (config.moe_backend, config.require_decomposed_backend) == (backend, decomposed)


def test_older_vllm_without_the_decomposed_backend(swap):
    config = SimpleNamespace(device=torch.device("cpu"), moe_backend="auto")
    with building(engine()):
        swap("model.layers.3.mlp.experts", moe_config=config)
    assert vars(config).keys() == {"device", "moe_backend"}


@pytest.mark.parametrize("shared", [None, object()])
def test_offloaded_layers_run_as_one_operator(shared):
    class MoERunner:
        _shared_experts = shared

        def _select_forward(self):
            return "forward of vLLM"

    moe_runner.apply(SimpleNamespace(MoERunner=MoERunner))
    assert MoERunner()._select_forward() == "forward of vLLM"
    operators = torch.ops.vllm
    with building(engine()):
        chosen = MoERunner()._select_forward()
    assert chosen is (operators.moe_forward if shared is None else operators.moe_forward_shared)


def test_loader_that_builds_by_itself_is_refused(monkeypatch):
    import vllm.config

    config = SimpleNamespace(
        additional_config={"moe_offload": {}}, load_config=SimpleNamespace(load_format="tensorizer")
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)

    class RoutedExperts:
        def _get_quant_method(self, prefix, quant_config, moe_config):
            return "stock"

    routed_experts.apply(SimpleNamespace(RoutedExperts=RoutedExperts))
    with pytest.raises(OffloadError) as error:
        RoutedExperts()._get_quant_method("model.layers.0.mlp.experts", None, None)
    message = str(error.value)
    assert "--load-format = tensorizer" in message
    assert "--load-format auto" in message
    config.additional_config = {}
    assert RoutedExperts()._get_quant_method("model.layers.0.mlp.experts", None, None) == "stock"
