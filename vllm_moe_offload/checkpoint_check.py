"""Find expert tensors that a checkpoint lacks by looking at its headers alone."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from vllm_moe_offload.headers import complete, files_without_index, read_header, weight_map

_PER_EXPERT = re.compile(r"^(?P<layer>.+\.experts?)\.(?P<expert>\d+)\.(?P<tensor>.+)$")


def missing_expert_tensors(names: Iterable[str], num_experts: int) -> list[str]:
    """Names that would complete the experts of every layer.

    In checkpoints that store experts one by one, every layer holds the same tensors for each of
    its experts; what one expert has and another lacks is missing.

    Args:
        names: all tensor names of the checkpoint.
        num_experts: routed experts a layer, by the model's configuration.

    Returns:
        The missing names, sorted; empty for checkpoints that store experts stacked.
    """
    present: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _PER_EXPERT.match(name):
            present[match["layer"]][match["tensor"]].add(int(match["expert"]))
    return sorted(
        f"{layer}.{expert}.{tensor}"
        for layer, tensors in present.items()
        for tensor, experts in tensors.items()
        for expert in set(range(num_experts)) - experts
    )


def tensor_names(folder: Path) -> list[str]:
    """Read the names in all safetensors headers of a checkpoint's folder.

    Raises:
        OffloadError: a file is cut off or damaged, or one of several is not there.
    """
    present = {file.name for file in folder.glob("*.safetensors")}
    if not present:
        return []
    indexed = {*weight_map(folder).values()}
    # An index beside other files alone belongs to a form of the checkpoint that is not here.
    names = indexed if indexed & present else files_without_index(folder)
    return [tensor.name for file in complete(folder, names) for tensor in read_header(file)]


def file_of(folder: Path, name: str) -> str | None:
    """Name of the file that holds a tensor, None if it is not known."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, framework="numpy") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return file.name
    return None
