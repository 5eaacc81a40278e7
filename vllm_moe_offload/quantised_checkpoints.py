"""Quantised twins of the tiny checkpoints, as the hub's checkpoints of each format are stored.

The experts of a checkpoint that `make_checkpoint` wrote are rounded to a format and packed from
its definition; everything else stays as it is, because not every machine has kernels for it. The
same function writes the twin that holds in float32 what the codes mean, so that both can be run
and compared.

Legend: N rows and K terms of a weight, G groups of terms, E experts, H hidden size, I intermediate
size.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Packed = dict[str, Tensor]
"""Tensors of one weight by the ending of their names."""

_E4M3_MAX = 448.0
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantise_checkpoint(source: Path, path: Path, form: str, *, decoded: bool = False) -> Path:
    """Write the twin of a checkpoint whose experts are stored in a format.

    Args:
        source: a folder that `make_checkpoint` wrote; "mxfp4" wants the family gpt_oss, the
            others a family that stores its experts one by one.
        path: folder to write.
        form: one of `FORMATS`.
        decoded: write what the codes mean in float32 instead, an unquantised checkpoint.

    Returns:
        ``path``.
    """
    quantise = _QUANTISERS[form]
    return quantise_experts(
        source, path, lambda _, weight: quantise(weight), _CONFIGS[form], decoded=decoded
    )


def quantise_experts(
    source: Path,
    path: Path,
    quantise: Callable[[str, Tensor], tuple[Packed, Tensor]],
    configure: Callable[[list[str]], dict[str, Any]],
    *,
    decoded: bool = False,
) -> Path:
    """Write the twin of a checkpoint whose experts are stored as a function says.

    Args:
        source: a folder that `make_checkpoint` wrote.
        path: folder to write.
        quantise: from the name of an expert's weight and the weight [N, K], or stacked ones
            [E, N, K], to its tensors and to what they mean.
        configure: from the names of all other linear layers to the quantisation config.
        decoded: write what the codes mean in float32 instead, an unquantised checkpoint.

    Returns:
        ``path``.
    """
    from safetensors.torch import load_file, save_file

    path.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copy(file, path / file.name)
            continue
        tensors = dict(_converted(load_file(file), quantise, decoded))
        save_file(tensors, path / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if not decoded:
        config = json.loads((path / "config.json").read_text())
        skipped = sorted({n.removesuffix(".weight") for n in weight_map if _is_other_linear(n)})
        config["quantization_config"] = configure(skipped)
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def _is_other_linear(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name and ".experts." not in name


_EXPERT = re.compile(r".*\.experts\.\d+\..+\.weight$")
_STACKED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)$")


def _converted(
    tensors: dict[str, Tensor],
    quantise: Callable[[str, Tensor], tuple[Packed, Tensor]],
    decoded: bool,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if _STACKED.match(name):
            # Stacked [E, K, N], while blocks run along K.
            packed, value = quantise(name, tensor.float().transpose(1, 2))
            if decoded:
                yield name, value.transpose(1, 2).contiguous()
            else:
                yield from ((f"{name}_{ending}", part) for ending, part in packed.items())
        elif _EXPERT.match(name):
            packed, value = quantise(name, tensor.float())
            stem = name.removesuffix("weight")
            if decoded:
                yield name, value.contiguous()
            else:
                yield from ((stem + ending, part) for ending, part in packed.items())
        elif name.endswith("proj_bias"):
            # vLLM has no other type for the biases of such experts.
            rounded = tensor.bfloat16()
            yield name, rounded.float() if decoded else rounded
        else:
            yield name, tensor


def _fp8_block(weight_NK: Tensor) -> tuple[Packed, Tensor]:
    tiles = weight_NK.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = tiles.abs().amax((1, 3)) / _E4M3_MAX
    codes, value = _e4m3(tiles, scale[:, None, :, None])
    codes, value = (t.flatten(2).flatten(0, 1) for t in (codes, value))
    return {"weight": codes.contiguous(), "weight_scale_inv": scale}, value


def _fp8_channel(weight_NK: Tensor) -> tuple[Packed, Tensor]:
    scale = weight_NK.abs().amax(1, keepdim=True) / _E4M3_MAX
    codes, value = _e4m3(weight_NK, scale)
    return {"weight": codes, "weight_scale": scale}, value


def fp8_tensor(weight_NK: Tensor) -> tuple[Packed, Tensor]:
    """How fp8 stores a weight [N, K] with one scale, and one for its activations."""
    scale = weight_NK.abs().amax() / _E4M3_MAX
    codes, value = _e4m3(weight_NK, scale)
    inputs = torch.tensor([0.05])
    return {"weight": codes, "weight_scale": scale.reshape(1), "input_scale": inputs}, value


def _e4m3(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    codes = (weight / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


def _integers(
    weight_NK: Tensor, group: int, bits: int, *, zeros: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, G] in float16, zero points [N, G], and what they mean."""
    groups = weight_NK.unflatten(1, (-1, group or weight_NK.shape[1]))
    top = 2**bits - 1
    if zeros:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / top).half()
        zero = torch.round(-low / scale.float()).clamp(0, top)
    else:
        scale = (groups.abs().amax(2) / (top // 2)).half()
        zero = torch.full_like(scale, 2 ** (bits - 1)).float()
    codes = torch.round(groups / scale.float()[..., None]) + zero[..., None]
    codes = codes.clamp(0, top)
    value = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.flatten(1).int(), scale, zero.int(), value.flatten(1)


def _words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack the last dimension into int32, the lowest bits first; ``order`` says whose they are."""
    per_word = 32 // bits
    lanes = codes.long().unflatten(-1, (-1, per_word))
    if order is not None:
        lanes = lanes[..., list(order)]
    words = (lanes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _pack_quantized(group: int, bits: int, *, zeros: bool) -> Callable[[Tensor], Any]:
    def quantise(weight_NK: Tensor) -> tuple[Packed, Tensor]:
        codes, scale, zero, value = _integers(weight_NK, group, bits, zeros=zeros)
        packed = {
            "weight_packed": _words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight_NK.shape),
        }
        if zeros:
            packed["weight_zero_point"] = _words(zero.T, bits).T.contiguous()
        return packed, value

    return quantise


def gptq(bits: int, group: int = 32) -> Callable[[Tensor], tuple[Packed, Tensor]]:
    """How GPTQ stores a weight [N, K], symmetric; one group a row if ``group`` is 0."""

    def quantise(weight_NK: Tensor) -> tuple[Packed, Tensor]:
        codes, scale, zero, value = _integers(weight_NK, group, bits, zeros=False)
        terms = weight_NK.shape[1]
        return {
            "qweight": _words(codes, bits).T.contiguous(),
            "scales": scale.T.contiguous(),
            # The format stores zero points less one.
            "qzeros": _words(zero.T - 1, bits),
            "g_idx": torch.arange(terms, dtype=torch.int32) // (group or terms),
        }, value

    return quantise


_AWQ_LANES = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(group: int = 32) -> Callable[[Tensor], tuple[Packed, Tensor]]:
    """How AWQ stores a weight [N, K]."""

    def quantise(weight_NK: Tensor) -> tuple[Packed, Tensor]:
        codes, scale, zero, value = _integers(weight_NK, group, 4, zeros=True)
        return {
            "qweight": _words(codes.T, 4, _AWQ_LANES),
            "scales": scale.T.contiguous(),
            "qzeros": _words(zero.T, 4, _AWQ_LANES),
        }, value

    return quantise


def _e2m1(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the 4-bit floats: codes as uint8, and their values."""
    index = (values.abs()[..., None] - _E2M1).abs().argmin(-1)
    codes = index.to(torch.uint8) | (values < 0).to(torch.uint8) << 3
    return codes, _E2M1[index] * torch.where(values < 0, -1.0, 1.0)


def _bytes_of_nibbles(codes: Tensor) -> Tensor:
    return codes[..., ::2] | codes[..., 1::2] << 4


def _mxfp4(weight_ENK: Tensor) -> tuple[Packed, Tensor]:
    blocks = weight_ENK.unflatten(-1, (-1, 32))
    # The largest power of two of a block becomes that of the largest code, 4.
    largest = blocks.abs().amax(-1).clamp(min=2.0**-100)
    exponent = torch.floor(torch.log2(largest)) - 2
    codes, value = _e2m1(blocks / torch.exp2(exponent)[..., None])
    packed = {
        "blocks": _bytes_of_nibbles(codes).contiguous(),
        "scales": (exponent + 127).to(torch.uint8),
    }
    return packed, (value * torch.exp2(exponent)[..., None]).flatten(-2)


def _mxfp4_by_expert(weight_NK: Tensor) -> tuple[Packed, Tensor]:
    packed, value = _mxfp4(weight_NK)
    return {"weight": packed["blocks"].flatten(1), "weight_scale": packed["scales"]}, value


_NVFP4_LARGEST = 8.0
"""Of the weights: gate and up of an expert have one global scale in published checkpoints."""


def _nvfp4(weight_NK: Tensor) -> tuple[Packed, Tensor]:
    blocks = weight_NK.unflatten(1, (-1, 16))
    assert weight_NK.abs().amax() <= _NVFP4_LARGEST
    whole = torch.tensor(_NVFP4_LARGEST / (6.0 * _E4M3_MAX))
    scale = (blocks.abs().amax(2) / 6.0 / whole).to(torch.float8_e4m3fn)
    step = (scale.float() * whole)[..., None]
    codes, value = _e2m1(blocks / step)
    return {
        "weight": _bytes_of_nibbles(codes.flatten(1)).contiguous(),
        "weight_scale": scale,
        "weight_scale_2": whole.reshape(()),
        "input_scale": torch.tensor(0.01),
    }, (value * step).flatten(1)


def _nvfp4_packed(weight_NK: Tensor) -> tuple[Packed, Tensor]:
    packed, value = _nvfp4(weight_NK)
    return {
        "weight_packed": packed["weight"],
        "weight_scale": packed["weight_scale"],
        # What weights were multiplied by, where the other kind of checkpoint divides.
        "weight_global_scale": packed["weight_scale_2"].reciprocal().reshape(1),
        "input_global_scale": packed["input_scale"].reciprocal().reshape(1),
    }, value


_QUANTISERS: dict[str, Callable[[Tensor], tuple[Packed, Tensor]]] = {
    "fp8": _fp8_block,
    "fp8-channel": _fp8_channel,
    "fp8-tensor": fp8_tensor,
    "w4a16": _pack_quantized(32, 4, zeros=False),
    "w4a16-zeros": _pack_quantized(64, 4, zeros=True),
    "w4a16-channel": _pack_quantized(0, 4, zeros=False),
    "w8a16": _pack_quantized(32, 8, zeros=False),
    "gptq": gptq(4),
    "gptq-8bit": gptq(8),
    "awq": awq(),
    "nvfp4": _nvfp4,
    "nvfp4-packed": _nvfp4_packed,
    "mxfp4": _mxfp4,
    "mxfp4-by-expert": _mxfp4_by_expert,
}

FORMATS: tuple[str, ...] = tuple(_QUANTISERS)
"""What `quantise_checkpoint` writes."""


def _compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> Any:
    group = {
        "targets": ["Linear"],
        "weights": {"dynamic": False, "symmetric": True, **weights},
        "input_activations": inputs,
        "output_activations": None,
    }
    return lambda skipped: {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": skipped,
    }


def _packed_config(group: int, bits: int, *, symmetric: bool = True) -> Any:
    by_group = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **by_group}
    return _compressed(weights, None, "pack-quantized")


_FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}

_CONFIGS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "fp8": lambda skipped: {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": skipped,
    },
    "fp8-channel": _compressed(
        {**_FLOAT8, "strategy": "channel"},
        {**_FLOAT8, "strategy": "token", "dynamic": True},
        "float-quantized",
    ),
    "fp8-tensor": _compressed(
        {**_FLOAT8, "strategy": "tensor"},
        {**_FLOAT8, "strategy": "tensor", "dynamic": False},
        "float-quantized",
    ),
    "w4a16": _packed_config(32, 4),
    "w4a16-zeros": _packed_config(64, 4, symmetric=False),
    "w4a16-channel": _packed_config(0, 4),
    "w8a16": _packed_config(32, 8),
    "gptq": lambda skipped: gptq_config(4, 32, skipped),
    "gptq-8bit": lambda skipped: gptq_config(8, 32, skipped),
    "awq": lambda skipped: {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped,
    },
    "nvfp4": lambda skipped: {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": skipped,
        "producer": {"name": "modelopt"},
    },
    "nvfp4-packed": _compressed(
        _FLOAT4, {**_FLOAT4, "symmetric": True, "dynamic": "local"}, "nvfp4-pack-quantized"
    ),
    "mxfp4": lambda skipped: {"quant_method": "mxfp4", "modules_to_not_convert": skipped},
    "mxfp4-by-expert": lambda skipped: {
        "quant_method": "mxfp4", "modules_to_not_convert": skipped,
    },
}  # fmt: skip


def gptq_config(bits: int, group: int, skipped: list[str]) -> dict[str, Any]:
    """The quantisation config of a GPTQ checkpoint that leaves some linear layers as they are."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "desc_act": False,
        "sym": True,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
    }
