"""Facts about a machine, as read or measured."""

from dataclasses import dataclass, field

from vllm_moe_offload.pcie import Link


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it.

    ``best_link`` is the fastest that the GPU and its slot agree on, ``numa_node`` the node next to
    it; None where the driver or the kernel does not tell.
    """

    name: str
    driver: str
    memory_bytes: int
    address: str
    best_link: Link | None
    numa_node: int | None


@dataclass(frozen=True)
class Rates:
    """What was measured between the host and a GPU, in bytes a second.

    ``link`` is the PCIe link while it was busy. ``problem`` says why there is no measurement.
    """

    link: Link | None = None
    copy_to_gpu: float | None = None
    copy_to_host: float | None = None
    gather_to_gpu: float | None = None
    gather_to_host: float | None = None
    pinned_bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Host:
    """Memory of the machine and what this process may do with it.

    ``memlock_bytes`` is None without a limit. ``nodes`` are the machine's NUMA nodes with memory,
    ``own_nodes`` those whose processors this process may use. ``bytes_per_s`` counts what a copy
    in memory reads and writes.
    """

    memory_bytes: int
    available_bytes: int
    limited_by: str
    cgroup_bytes: int | None
    memlock_bytes: int | None
    may_lock: bool
    huge_pages: str | None
    nodes: frozenset[int]
    own_nodes: frozenset[int]
    bytes_per_s: float


@dataclass(frozen=True)
class Software:
    """Versions by distribution, None where one is missing, and how vLLM sees the plugin."""

    versions: dict[str, str | None]
    is_registered: bool
    vllm_plugins: str | None
    any_vllm: bool


@dataclass(frozen=True)
class Facts:
    """All of it. ``rates`` are by the GPU's address; ``smi_problem`` is nvidia-smi's complaint."""

    host: Host
    software: Software
    gpus: tuple[Gpu, ...] = ()
    rates: dict[str, Rates] = field(default_factory=dict)
    smi_problem: str | None = None
