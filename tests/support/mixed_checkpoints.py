"""Checkpoints whose layers are stored in different ways of one format, so that one start tests all.

compressed-tensors' own compressors pack its checkpoints and decode them again; GPTQ's are packed
from its definition. Both formats know such checkpoints, by rules for the names of layers.

Legend: N rows and K terms of a weight, G groups of terms with one scale.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from vllm_moe_offload.quantised_checkpoints import (
    awq,
    fp8_tensor,
    gptq,
    gptq_config,
    quantise_experts,
)

Store = Callable[..., Path]
"""From a checkpoint, a folder and ``decoded`` to the checkpoint stored in a format."""

Quantise = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]

GPTQ = [(bits, group) for bits in (4, 8) for group in (32, 64, 128, 0)]
"""Bits and group of each layer, 0 for one group a row."""


def _integers(bits: int, group: int, *, symmetric: bool = True) -> dict[str, Any]:
    by_group = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **by_group}


def _fp8(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
          "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip

COMPRESSED: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    *(
        ("pack-quantized", _integers(bits, group, symmetric=symmetric), None)
        for bits, symmetric in ((4, True), (4, False), (8, True))
        for group in (32, 64, 128, 0)
    ),
    ("float-quantized", _fp8("channel"), _fp8("token", dynamic=True)),
    ("float-quantized", _fp8("tensor"), _fp8("tensor")),
    ("float-quantized", _fp8("tensor"), _fp8("tensor", dynamic=True)),
    (
        "float-quantized",
        _fp8("block", block_structure=[128, 128]),
        _fp8("group", group_size=128, dynamic=True),
    ),
    ("nvfp4-pack-quantized", _NVFP4, {**_NVFP4, "dynamic": "local"}),
    ("nvfp4-pack-quantized", _NVFP4, None),
]
"""Format, weights and activations of each layer."""


def mixed_gptq(source: Path, path: Path, *, decoded: bool) -> Path:
    """Store layer n of a checkpoint as ``GPTQ[n]`` says."""

    def configure(skipped: list[str]) -> dict[str, Any]:
        config = gptq_config(*GPTQ[0], skipped)
        config["dynamic"] |= {
            f"+:.*\\.{n}\\..*": {"bits": bits, "group_size": group or -1}
            for n, (bits, group) in enumerate(GPTQ)
        }
        return config

    return _by_layer(source, path, [gptq(*each) for each in GPTQ], configure, decoded)


def mixed_compressed(source: Path, path: Path, *, decoded: bool) -> Path:
    """Store layer n of a checkpoint as ``COMPRESSED[n]`` says."""
    schemes = [
        QuantizationScheme(
            targets=[f"re:.*layers\\.{n}\\..*experts.*"],
            weights=QuantizationArgs(**weights),
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
            format=form,
        )
        for n, (form, weights, inputs) in enumerate(COMPRESSED)
    ]

    def configure(skipped: list[str]) -> dict[str, Any]:
        return QuantizationConfig(
            config_groups={f"group_{n}": scheme for n, scheme in enumerate(schemes)},
            format="mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=skipped,
        ).model_dump(mode="json")

    return _by_layer(source, path, [_compressor(s) for s in schemes], configure, decoded)


def awq_of(group: int) -> Store:
    """How to store a checkpoint as AWQ, which knows one group size."""
    quantise = awq(group)

    def configure(skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": skipped,
        }  # fmt: skip

    return lambda source, path, *, decoded: quantise_experts(
        source, path, lambda _, weight: quantise(weight), configure, decoded=decoded
    )


def fp8_of(activations: str) -> Store:
    """How to store a checkpoint as fp8 with a scale a tensor, without compressed-tensors."""

    def quantise(_: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        packed, value = fp8_tensor(weight)
        if activations == "dynamic":
            del packed["input_scale"]
        return packed, value

    def configure(skipped: list[str]) -> dict[str, Any]:
        return {"quant_method": "fp8", "activation_scheme": activations, "ignored_layers": skipped}

    return lambda source, path, *, decoded: quantise_experts(
        source, path, quantise, configure, decoded=decoded
    )


def _by_layer(
    source: Path,
    path: Path,
    quantisers: Sequence[Quantise],
    configure: Callable[[list[str]], dict[str, Any]],
    decoded: bool,
) -> Path:
    def quantise(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        found = re.search(r"\.layers\.(\d+)\.", name)
        assert found, name
        return quantisers[int(found[1])](weight)

    return quantise_experts(source, path, quantise, configure, decoded=decoded)


def _compressor(scheme: QuantizationScheme) -> Quantise:
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert scheme.weights is not None

    def quantise(weight_NK: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        state = {"weight": weight_NK, **_parameters(weight_NK, scheme)}
        packed = compressor.compress(state, scheme)
        packed["weight_scale"] = packed["weight_scale"].contiguous()
        return packed, decoded(packed)

    def decoded(packed: dict[str, torch.Tensor]) -> torch.Tensor:
        if "weight_global_scale" not in packed:
            return compressor.decompress(dict(packed), scheme)["weight"].float()
        # Here the compressor would round to bfloat16.
        rows, width = packed["weight_packed"].shape
        values = unpack_fp4_from_uint8(packed["weight_packed"], rows, 2 * width, torch.float32)
        scale, whole = packed["weight_scale"].float(), packed["weight_global_scale"]
        return dequantize(values, scale, global_scale=whole, args=scheme.weights)

    return quantise


def _parameters(weight_NK: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Scales and zero points from the range of what shares them, and scales of activations."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    shared = _shared(weight_NK, weights)
    found, whole = {}, None
    if weights.strategy == "tensor_group":
        whole = generate_gparam(weight_NK.min(), weight_NK.max())
        found["weight_global_scale"] = whole
        if inputs is not None:
            found["input_global_scale"] = torch.tensor([300.0])
    elif inputs is not None and not inputs.dynamic:
        found["input_scale"] = torch.tensor([0.05])
    scale, zero = calculate_qparams(shared.amin(-1), shared.amax(-1), weights, global_scale=whole)
    return {**found, "weight_scale": scale, "weight_zero_point": zero}


def _shared(weight_NK: torch.Tensor, weights: QuantizationArgs) -> torch.Tensor:
    """All weights with one scale along the last dimension."""
    if weights.strategy == "tensor":
        return weight_NK.reshape(1, -1)
    if weights.strategy == "channel":
        return weight_NK[:, None]
    if weights.strategy == "block":
        rows, terms = weights.block_structure
        tiles = weight_NK.unflatten(0, (-1, rows)).unflatten(2, (-1, terms))
        return tiles.transpose(1, 2).flatten(2)
    return weight_NK.unflatten(1, (-1, weights.group_size))
