"""Find a checkpoint on this machine and read its config and safetensors headers, no weights."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.headers import (
    INDEX,
    REPAIR,
    StoredTensor,
    read_header,
    read_json,
    tensor_files,
    weight_map,
)

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and everything that its files hold."""

    folder: Path
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


def read_checkpoint(model: str, environment: Mapping[str, str] = os.environ) -> Checkpoint:
    """Read a local checkpoint.

    Args:
        model: its folder, or its name on the hub if it is in the local cache.
        environment: tells where Hugging Face's cache is.

    Raises:
        OffloadError: it is not here, or not whole, with what to do.
    """
    folder = find_folder(model, environment)
    config = read_json(folder / "config.json", "Give a folder in Hugging Face's format")
    tensors = tuple(tensor for file in tensor_files(folder) for tensor in read_header(file))
    if lost := sorted(set(weight_map(folder)) - {tensor.name for tensor in tensors}):
        raise OffloadError(
            "checkpoint",
            folder,
            f"{len(lost)} tensors of {INDEX} are in no file, the first is {lost[0]}",
            REPAIR,
        )
    return Checkpoint(folder, config, tensors)


def find_folder(model: str, environment: Mapping[str, str]) -> Path:
    """Return the checkpoint's folder.

    Raises:
        OffloadError: there is none on this machine.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    remedy = "Give the folder of a checkpoint"
    if _HUB_ID.match(model) and not folder.exists():
        cached = _hub_cache(environment) / f"models--{model.replace('/', '--')}"
        revision = cached / "refs" / "main"
        if revision.is_file():
            snapshot = cached / "snapshots" / revision.read_text().strip()
            if snapshot.is_dir():
                return snapshot
        remedy = f"Download it with hf download {model}, or give the folder of a checkpoint"
    problem = "there is no such folder, and Hugging Face's local cache does not hold it"
    raise OffloadError("model", model, problem, remedy)


def _hub_cache(environment: Mapping[str, str]) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    home = environment.get("HF_HOME")
    if not home:
        home = str(Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"
