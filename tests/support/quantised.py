"""Checkpoints of quantised experts, whole or with something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, torch.Tensor]], Any]
"""Changes the tensors of a file in place."""


def family_of(form: str) -> str:
    """The family whose tiny checkpoint a format is made from."""
    return "gpt_oss" if form == "mxfp4" else "qwen3_moe"


def copy_with(
    source: Path, target: Path, change: Change | None = None, **quantization: Any
) -> Path:
    """A checkpoint with other tensors or another quantisation config."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config))
    for file in target.glob("*.safetensors") if change else ():
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def changed(ending: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    """Give all tensors with an ending of their name another value, or drop them for None."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ending)]:
            tensor = value(tensors.pop(name))
            if tensor is not None:
                tensors[name] = tensor.contiguous()

    return change
