"""Safetensors files by their headers: what they hold, and whether they are whole."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_moe_offload.errors import OffloadError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library; more is no header."""

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits an element by safetensors' name of the type."""

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors$")

REPAIR = "Download the checkpoint again or repair it"


class StoredTensor(NamedTuple):
    """A tensor as a header describes it; ``dtype`` is safetensors' name, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(file: Path) -> Iterator[StoredTensor]:
    """Read the tensors of a safetensors file and check that the file holds all their bytes.

    Raises:
        OffloadError: the header or the data is cut off or damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise OffloadError(
                "checkpoint", file, "it is a Git LFS pointer, not the weights", "Run git lfs pull"
            )
        if len(start) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise OffloadError("checkpoint", file, "the header is cut off or damaged", REPAIR)
        text = stream.read(length)
    try:
        tensors = [_stored(name, entry) for name, entry in json.loads(text).items()
                   if name != "__metadata__"]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OffloadError("checkpoint", file, "the header is damaged", REPAIR) from None
    expected = _LENGTH_BYTES + length + sum(tensor.num_bytes for tensor in tensors)
    if size != expected:
        problem = f"its header tells of {expected} bytes, but it has {size}"
        raise OffloadError("checkpoint", file, problem, REPAIR)
    yield from tensors


def _stored(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), end - begin)
    bits = _BITS.get(tensor.dtype)
    if bits is not None and tensor.num_bytes * 8 != math.prod(tensor.shape) * bits:
        raise ValueError(name)
    return tensor


def weight_map(folder: Path) -> Mapping[str, str]:
    """Files by tensor name as the index has it; empty if there is no index.

    Raises:
        OffloadError: the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    names = read_json(index, REPAIR).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise OffloadError("checkpoint", index, "it has no weight_map", REPAIR)
    return names


def tensor_files(folder: Path) -> list[Path]:
    """Return the files that make up a checkpoint.

    Raises:
        OffloadError: there is none, some are not there, or the index is damaged.
    """
    indexed = {*weight_map(folder).values()}
    # An index beside other files alone belongs to a form of the checkpoint that is not here.
    is_here = any((folder / name).is_file() for name in indexed)
    return _complete(folder, indexed if is_here else _files_without_index(folder))


def _files_without_index(folder: Path) -> set[str]:
    """Names of the files, and of those that must be there by the numbers of the others."""
    found = {file.name for file in folder.glob("*.safetensors")}
    if not found:
        raise OffloadError(
            "checkpoint",
            folder,
            "it holds no safetensors file",
            "Download or convert the weights as safetensors; other formats cannot be planned",
        )
    shards = [match for name in sorted(found) if (match := _SHARD.match(name))]
    return found | {
        f"{shard['stem']}-{number:05}-of-{shard['total']}.safetensors"
        for shard in shards
        for number in range(1, int(shard["total"]) + 1)
    }


def _complete(folder: Path, names: set[str]) -> list[Path]:
    files = [folder / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        problem = f"{len(missing)} of {len(files)} shards are missing, the first is {missing[0]}"
        raise OffloadError("checkpoint", folder, problem, "Download the missing files")
    return files


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read an object.

    Raises:
        OffloadError: there is none, with this remedy if there is no file.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise OffloadError("checkpoint", file.parent, f"it has no {file.name}", remedy) from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise OffloadError("checkpoint", file, "it is no valid JSON object", REPAIR)
    return content
