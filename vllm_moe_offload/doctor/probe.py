"""Read what the driver, the kernel and the package metadata say; measures nothing."""

import os
import re
import resource
import subprocess
from importlib import metadata
from pathlib import Path

from vllm_moe_offload.doctor.facts import Gpu, Host, Software
from vllm_moe_offload.memory import available_host_memory, cgroup_limit, meminfo
from vllm_moe_offload.patches.version import OVERRIDE
from vllm_moe_offload.pcie import Link, device_folder, short_address

DISTRIBUTIONS = ("vllm", "vllm-moe-offload", "torch", "triton", "transformers")

_CAP_IPC_LOCK = 14
"""Bit of the capability to lock any amount of memory, from linux/capability.h."""

_FIELDS = (
    "name", "driver_version", "memory.total", "pci.bus_id", "pcie.link.gen.max",
    "pcie.link.width.max",
)  # fmt: skip

_SMI_TIMEOUT_S = 10


def read_gpus(root: Path = Path("/")) -> tuple[tuple[Gpu, ...], str | None]:
    """Ask nvidia-smi for the GPUs.

    Returns:
        The GPUs, and its complaint if it has one; neither without an NVIDIA driver.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        devices = (root / "dev/nvidiactl").exists()
        return (), "nvidia-smi is not installed beside the driver" if devices else None
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi does not answer in {_SMI_TIMEOUT_S} s"
    if result.returncode != 0:
        return (), " ".join((result.stdout + result.stderr).split())
    return tuple(_gpu(line, root) for line in result.stdout.splitlines() if line.strip()), None


def _gpu(line: str, root: Path) -> Gpu:
    name, driver, mebibytes, address, generation, width = (x.strip() for x in line.split(","))
    known = generation.isdigit() and width.isdigit() and int(width) > 0
    node = _text(device_folder(address, root) / "numa_node")
    return Gpu(
        name=name,
        driver=driver,
        # Some GPUs share the host's memory and have none of their own.
        memory_bytes=int(mebibytes) << 20 if mebibytes.isdigit() else 0,
        address=short_address(address),
        best_link=Link(int(generation), int(width)) if known else None,
        # The kernel writes -1 where the machine has one node or the firmware does not say.
        numa_node=int(node) if node is not None and node.isdigit() else None,
    )


def read_host(bytes_per_s: float, root: Path = Path("/")) -> Host:
    """Read memory, limits and NUMA nodes.

    Args:
        bytes_per_s: measured rate of a copy in memory.
        root: where ``proc`` and ``sys`` are mounted.
    """
    memory = available_host_memory(root)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    nodes = _nodes(root)
    own = os.sched_getaffinity(0)
    modes = _text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    mode = re.search(r"\[(\w+)\]", modes)
    return Host(
        memory_bytes=meminfo(root)["MemTotal"],
        available_bytes=memory.available,
        limited_by=memory.limited_by,
        cgroup_bytes=cgroup_limit(root),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        may_lock=_may_lock(root),
        huge_pages=mode and mode[1],
        nodes=frozenset(nodes),
        own_nodes=frozenset(node for node, cpus in nodes.items() if cpus & own),
        bytes_per_s=bytes_per_s,
    )


def read_software() -> Software:
    """Read versions and the plugin's registration from package metadata."""
    plugins = metadata.entry_points(group="vllm.general_plugins")
    return Software(
        versions={name: _version(name) for name in DISTRIBUTIONS},
        is_registered="moe-offload" in plugins.names,
        vllm_plugins=os.environ.get("VLLM_PLUGINS"),
        any_vllm=os.environ.get(OVERRIDE) == "1",
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _may_lock(root: Path) -> bool:
    status = _text(root / "proc/self/status") or ""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1)


def _nodes(root: Path) -> dict[int, set[int]]:
    """Processors of every NUMA node that has memory."""
    folder = root / "sys/devices/system/node"
    with_memory = _numbers(_text(folder / "has_memory") or "")
    return {node: _numbers(_text(folder / f"node{node}/cpulist") or "") for node in with_memory}


def _numbers(text: str) -> set[int]:
    """Parse the kernel's lists, such as 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
