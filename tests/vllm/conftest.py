"""Real vLLM engines on tiny checkpoints."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cpu_settings
import pytest
import torch

# Before vLLM is imported: it reads its environment once.
os.environ.update(cpu_settings.env("any"))


@pytest.fixture(autouse=True, scope="module")
def no_interpreter() -> Iterator[None]:
    """Run the engine's torch forms here, whatever other tests of this process chose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a family's checkpoint once a session."""
    from vllm_moe_offload.checkpoints import make_checkpoint

    made: dict[object, Path] = {}

    def make(family: str, **shape: object) -> Path:
        key = (family, *sorted(shape.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **shape)
        return made[key]

    return make


QUANTISATIONS = ("fp8", "compressed-tensors", "auto_gptq", "auto_awq", "moe_wna16",
                 "gpt_oss_mxfp4", "mxfp4", "modelopt_fp4")  # fmt: skip


@pytest.fixture
def float32_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats of vLLM want 16-bit activations, in which two correct programs differ."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    types = classmethod(lambda _: [torch.float32, torch.bfloat16, torch.float16])
    for name in QUANTISATIONS:
        monkeypatch.setattr(get_quantization_config(name), "get_supported_act_dtypes", types)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave activations as they are where a format rounds them, as on a GPU without e4m3."""
    from vllm_moe_offload import layer

    monkeypatch.setattr(layer, "has_e4m3", lambda _: False)


@pytest.fixture(scope="session")
def quantised(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Makes the twins of a checkpoint in a format, once a session."""
    from quantised import family_of

    from vllm_moe_offload.quantised_checkpoints import quantise_checkpoint

    made: dict[tuple[str, bool], Path] = {}

    def make(form: str, *, decoded: bool = False) -> Path:
        if (form, decoded) not in made:
            source = checkpoint(family_of(form), num_layers=2, intermediate_size=128)
            path = tmp_path_factory.mktemp(form)
            made[form, decoded] = quantise_checkpoint(source, path, form, decoded=decoded)
        return made[form, decoded]

    return make
