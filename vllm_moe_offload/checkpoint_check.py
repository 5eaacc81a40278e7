"""Find what a checkpoint's experts lack, before weights are loaded, by little more than headers."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from vllm_moe_offload.headers import read_header, tensor_files

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
    return [tensor.name for file in _files(folder) for tensor in read_header(file)]


def is_group_index(name: str) -> bool:
    """Whether a tensor tells to which group each input of a GPTQ expert belongs."""
    return name.endswith(".g_idx") and _PER_EXPERT.match(name) is not None


def groups_out_of_order(folder: Path) -> str | None:
    """Name a GPTQ expert whose groups are in the order of activations (act-order).

    vLLM leaves the indices of groups out, so that such weights would be decoded by other groups'
    scales. A checkpoint is made in one way: one tensor of each file is looked at.
    """
    from safetensors import safe_open

    for file in _files(folder):
        name = next((t.name for t in read_header(file) if is_group_index(t.name)), None)
        if name is None:
            continue
        with safe_open(file, framework="pt") as content:
            if bool((content.get_tensor(name).diff() < 0).any()):
                return name
    return None


def file_of(folder: Path, name: str) -> str | None:
    """Name of the file that holds a tensor, None if it is not known."""
    holders = (f.name for f in _files(folder) if any(t.name == name for t in read_header(f)))
    return next(holders, None)


def _files(folder: Path) -> list[Path]:
    """Files of a checkpoint that is here as safetensors, none of another."""
    return tensor_files(folder) if any(folder.glob("*.safetensors")) else []
