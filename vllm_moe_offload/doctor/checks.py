"""Judge a machine by its facts. Pure.

The shares below are of what PCIe carries before packet headers: large copies from pinned memory
reach 0.75 (generation 3) to 0.87 (generation 5) of it, the gather kernel a tenth less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_moe_offload.doctor.facts import Facts, Gpu, Host, Rates, Software
from vllm_moe_offload.patches.version import OVERRIDE, TESTED
from vllm_moe_offload.pcie import Link
from vllm_moe_offload.sizes import GIB, format_rate, format_size

Verdict = Literal["ok", "slow", "broken"]

COPY_SHARE = 0.7
GATHER_SHARE = 0.6

REFERENCE_LINK = Link(3, 16)
"""What host memory is compared to where there is no GPU."""

_LITTLE_MEMORY = 8 * GIB

_HUGE = "/sys/kernel/mm/transparent_hugepage/enabled"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``remedy`` is empty if nothing is to be done."""

    subject: str
    verdict: Verdict
    value: str
    remedy: str = ""


def judge(facts: Facts) -> list[Finding]:
    """Judge everything, the GPUs first."""
    return [*_gpus(facts), *_host(facts), *_software(facts.software)]


def is_healthy(findings: list[Finding]) -> bool:
    """Whether nothing is broken."""
    return all(finding.verdict != "broken" for finding in findings)


def _gpus(facts: Facts) -> Iterator[Finding]:
    if facts.smi_problem:
        yield Finding("GPU", "broken", facts.smi_problem, "Install or restart the NVIDIA driver")
    elif not facts.gpus:
        yield Finding(
            "GPU",
            "slow",
            "none: vLLM would run on the CPU",
            "Use a machine with an NVIDIA GPU; in a container, pass it in (docker run --gpus all)",
        )
    for gpu in facts.gpus:
        rates = facts.rates.get(gpu.address, Rates(problem=_unseen(facts)))
        name = f"GPU {gpu.address}" if len(facts.gpus) > 1 else "GPU"
        memory = f", {format_size(gpu.memory_bytes)}" if gpu.memory_bytes else ""
        yield Finding(name, "ok", f"{gpu.name}{memory}, driver {gpu.driver}")
        yield _link(gpu, rates)
        yield from _rates(gpu, rates)
        yield _numa(gpu, facts.host)


def _unseen(facts: Facts) -> str:
    if facts.software.versions.get("torch") is None:
        return "PyTorch is not installed"
    if facts.rates:
        return "not measured: PyTorch does not see this GPU, or the time was up"
    return f"PyTorch {facts.software.versions['torch']} sees no GPU"


def _link(gpu: Gpu, rates: Rates) -> Finding:
    best, now = gpu.best_link, rates.link
    if best is None or now is None:
        value = f"{now or best or 'not known'}"
        hint = ", under load not known" if best and now is None else ""
        return Finding("PCIe link", "ok", value + hint)
    value = f"{now}, {format_rate(now.bytes_per_s)} each way"
    if now.bytes_per_s >= best.bytes_per_s:
        return Finding("PCIe link", "ok", value)
    return Finding(
        "PCIe link",
        "slow",
        f"{value}; the GPU and its slot could do {best}",
        "Move the GPU to a slot with all lanes, replace the riser, and look for lanes shared with "
        "other devices or a lower generation set in the firmware",
    )


def _rates(gpu: Gpu, rates: Rates) -> Iterator[Finding]:
    if rates.problem is not None:
        seen = rates.problem.startswith("not measured")
        yield Finding(
            "transfers",
            "slow" if seen else "broken",
            rates.problem,
            "Run it with CUDA_VISIBLE_DEVICES set to this GPU"
            if seen
            else "Install vLLM's CUDA build with a driver that is new enough for it, and free GPU "
            "and host memory",
        )
        return
    link = rates.link or gpu.best_link
    for name, rate, share in (
        ("copy to GPU", rates.copy_to_gpu, COPY_SHARE),
        ("copy to host", rates.copy_to_host, COPY_SHARE),
        ("gather to GPU", rates.gather_to_gpu, GATHER_SHARE),
        ("gather to host", rates.gather_to_host, GATHER_SHARE),
    ):
        if rate is not None:
            yield _transfer(name, rate, share, link)


def _transfer(name: str, rate: float, share: float, link: Link | None) -> Finding:
    if link is None:
        return Finding(name, "ok", format_rate(rate))
    value = f"{format_rate(rate)}, {rate / link.bytes_per_s:.0%} of {link}"
    if rate >= share * link.bytes_per_s:
        return Finding(name, "ok", value)
    return Finding(
        name,
        "slow",
        value,
        "Stop what else uses the bus or the memory, keep to the GPU's NUMA node, and switch off "
        "IOMMU translation (iommu=pt) if this is no virtual machine",
    )


def _numa(gpu: Gpu, host: Host) -> Finding:
    node = gpu.numa_node
    if len(host.nodes) <= 1 or node is None:
        nodes = f"{len(host.nodes)} node" + ("" if len(host.nodes) == 1 else "s")
        unknown = "; the GPU's is not known" if len(host.nodes) > 1 else ""
        return Finding("NUMA", "ok", nodes + unknown)
    value = f"GPU at node {node}, process on {_list(host.own_nodes)} of {_list(host.nodes)}"
    if host.own_nodes == {node}:
        return Finding("NUMA", "ok", value)
    return Finding(
        "NUMA", "slow", value, f"Start it with numactl --cpunodebind={node} --preferred={node}"
    )


def _host(facts: Facts) -> Iterator[Finding]:
    host = facts.host
    yield _memory(host)
    yield _bandwidth(facts)
    yield _cgroup(host)
    yield _memlock(facts)
    yield _huge_pages(host)
    if not facts.gpus:
        yield Finding("NUMA", "ok", f"process on node {_list(host.own_nodes)} of "
                      f"{_list(host.nodes)}")  # fmt: skip


def _memory(host: Host) -> Finding:
    value = f"{format_size(host.available_bytes)} available of {format_size(host.memory_bytes)}"
    if host.available_bytes >= _LITTLE_MEMORY:
        return Finding("host memory", "ok", value)
    return Finding(
        "host memory",
        "slow",
        f"{value}, by {host.limited_by}",
        "Free or add memory: all experts must fit into it (vllm-moe-offload plan tells)",
    )


def _bandwidth(facts: Facts) -> Finding:
    links = [
        link
        for gpu in facts.gpus
        if (link := facts.rates.get(gpu.address, Rates()).link or gpu.best_link)
    ]
    link = max(links, key=lambda each: each.bytes_per_s, default=REFERENCE_LINK)
    rate = facts.host.bytes_per_s
    value = f"{format_rate(rate)} read and written, {rate / link.bytes_per_s:.1f} times {link}"
    if rate >= link.bytes_per_s:
        return Finding("memory bandwidth", "ok", value)
    return Finding(
        "memory bandwidth",
        "slow",
        value,
        "Fill all memory channels, give the process more processors, and stop what else is running",
    )


def _cgroup(host: Host) -> Finding:
    limit = host.cgroup_bytes
    if limit is None or limit >= host.memory_bytes:
        return Finding("cgroup limit", "ok", "none")
    value = f"{format_size(limit)} of the machine's {format_size(host.memory_bytes)}"
    if 2 * limit >= host.memory_bytes:
        return Finding("cgroup limit", "ok", value)
    remedy = "Raise the container's limit (docker run --memory) if the experts need more"
    return Finding("cgroup limit", "slow", value, remedy)


def _memlock(facts: Facts) -> Finding:
    host = facts.host
    pinned = max((rates.pinned_bytes for rates in facts.rates.values()), default=0)
    if host.memlock_bytes is None:
        return Finding("locked memory", "ok", "no limit")
    value = f"limit of {format_size(host.memlock_bytes)}"
    if host.may_lock:
        return Finding("locked memory", "ok", f"{value}, which does not bind this user")
    if pinned > host.memlock_bytes:
        proof = f"but CUDA pinned {format_size(pinned)} under it"
        return Finding("locked memory", "ok", f"{value}, {proof}")
    remedy = "Raise it: ulimit -l unlimited, or docker run --ulimit memlock=-1"
    return Finding("locked memory", "slow", value, remedy)


def _huge_pages(host: Host) -> Finding:
    if host.huge_pages in ("always", "madvise"):
        return Finding("huge pages", "ok", f"{host.huge_pages}: the host pool gets them")
    if host.huge_pages is None:
        remedy = "Use a kernel with transparent huge pages"
        return Finding("huge pages", "slow", "the kernel has none", remedy)
    return Finding("huge pages", "slow", host.huge_pages, f"As root: echo madvise > {_HUGE}")


def _software(software: Software) -> Iterator[Finding]:
    yield _vllm(software)
    yield _plugin(software)
    others = [
        f"{name} {version}"
        for name, version in software.versions.items()
        if name not in ("vllm", "vllm-moe-offload") and version is not None
    ]
    yield Finding("libraries", "ok", ", ".join(others) or "none")


def _vllm(software: Software) -> Finding:
    version = software.versions.get("vllm")
    if version is None:
        return Finding("vLLM", "broken", "not installed", f"Install vllm{TESTED}")
    if TESTED.contains(version, prereleases=True):
        return Finding("vLLM", "ok", version)
    return Finding(
        "vLLM",
        "slow" if software.any_vllm else "broken",
        f"{version}, tested is {TESTED}",
        f"Install vllm{TESTED}" + ("" if software.any_vllm else f", or set {OVERRIDE}=1"),
    )


def _plugin(software: Software) -> Finding:
    version = software.versions.get("vllm-moe-offload")
    if version is None or not software.is_registered:
        remedy = "Install vllm-moe-offload into the environment of vLLM"
        return Finding("plugin", "broken", "vLLM cannot find it", remedy)
    allowed = software.vllm_plugins
    if allowed is not None and "moe-offload" not in allowed.split(","):
        remedy = "Unset VLLM_PLUGINS, or add moe-offload to it"
        return Finding("plugin", "broken", f"{version}, but VLLM_PLUGINS={allowed}", remedy)
    return Finding("plugin", "ok", version)


def _list(numbers: frozenset[int]) -> str:
    return ",".join(map(str, sorted(numbers))) or "none"
