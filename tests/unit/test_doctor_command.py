"""The doctor on the machine of the test, and its reading of files and programs."""

import json
import os
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from vllm_moe_offload import cli
from vllm_moe_offload.doctor import command, probe, rates
from vllm_moe_offload.doctor.facts import Facts, Gpu, Rates
from vllm_moe_offload.pcie import Link
from vllm_moe_offload.sizes import GIB

SUBJECTS = {
    "GPU", "host memory", "memory bandwidth", "cgroup limit", "locked memory", "huge pages", "NUMA",
    "vLLM", "plugin", "libraries",
}  # fmt: skip


def test_whole_examination_in_its_time():
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_moe_offload.cli", "doctor", "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert time.monotonic() - start < 30
    answer = json.loads(result.stdout)
    assert result.returncode == (0 if answer["healthy"] else 1), result.stderr
    assert {each["subject"].split(" 0000:")[0] for each in answer["findings"]} >= SUBJECTS
    assert 1e8 < answer["host_memory_bytes_per_s"] < 1e13


def smi(monkeypatch, stdout: str = "", code: int = 0, error: Exception | None = None) -> None:
    def run(*_args, **_kwargs):
        if error is not None:
            raise error
        return SimpleNamespace(returncode=code, stdout=stdout, stderr="")

    monkeypatch.setattr(probe.subprocess, "run", run)


def test_gpus_of_nvidia_smi(monkeypatch, tmp_path):
    smi(monkeypatch, "A GPU, 580.1, 81559, 00000000:4B:00.0, 5, 16\n"
                     "Another, 580.1, [N/A], 00000000:4C:00.0, [N/A], [N/A]\n")  # fmt: skip
    folder = tmp_path / "sys/bus/pci/devices/0000:4b:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    gpus, problem = probe.read_gpus(tmp_path)
    assert problem is None
    assert gpus == (
        Gpu("A GPU", "580.1", 81559 << 20, "0000:4b:00.0", Link(5, 16), 1),
        Gpu("Another", "580.1", 0, "0000:4c:00.0", None, None),
    )
    (folder / "numa_node").write_text("-1\n")
    assert probe.read_gpus(tmp_path)[0][0].numa_node is None


def test_complaints_of_nvidia_smi(monkeypatch, tmp_path):
    smi(monkeypatch, "it failed\n because", code=9)
    assert probe.read_gpus(tmp_path) == ((), "it failed because")
    smi(monkeypatch, error=subprocess.TimeoutExpired("nvidia-smi", 10))
    assert probe.read_gpus(tmp_path) == ((), "nvidia-smi does not answer in 10 s")


def test_no_nvidia_smi(monkeypatch, tmp_path):
    smi(monkeypatch, error=FileNotFoundError())
    assert probe.read_gpus(tmp_path) == ((), None)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert probe.read_gpus(tmp_path) == ((), "nvidia-smi is not installed beside the driver")


@pytest.fixture
def root(monkeypatch, tmp_path):
    """A machine of two nodes in a container of 4 GiB, whose process is on the second node."""
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/cgroup": "0::/box\n",
        "proc/self/status": "Name: x\nCapEff:\t0000000000004000\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB}\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        "sys/devices/system/node/has_memory": "0-1\n",
        "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
        "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 12})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    return tmp_path


def test_host(root):
    host = probe.read_host(5e9, root)
    assert (host.memory_bytes, host.available_bytes) == (16 * GIB, 3 * GIB)
    assert (host.cgroup_bytes, host.limited_by) == (4 * GIB, f"the container's limit of {4 * GIB} "
                                                    "bytes")  # fmt: skip
    assert (host.memlock_bytes, host.may_lock) == (65536, True)
    assert host.huge_pages == "never"
    assert (host.nodes, host.own_nodes) == ({0, 1}, {1})
    assert host.bytes_per_s == 5e9


def test_host_that_tells_little(root, monkeypatch):
    for name in ("sys/kernel/mm/transparent_hugepage/enabled", "sys/fs/cgroup/memory.max",
                 "sys/devices/system/node/has_memory"):  # fmt: skip
        (root / name).unlink()
    (root / "proc/self/status").write_text("CapEff:\t0000000000003fff\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    host = probe.read_host(5e9, root)
    assert (host.huge_pages, host.cgroup_bytes, host.memlock_bytes) == (None, None, None)
    assert (host.may_lock, host.nodes) == (False, frozenset())


def test_software(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "a,b")
    monkeypatch.setenv("MOE_OFFLOAD_ANY_VLLM", "1")
    software = probe.read_software()
    assert software.versions.keys() == set(probe.DISTRIBUTIONS)
    assert (software.vllm_plugins, software.any_vllm) == ("a,b", True)
    assert probe._version("no-such-distribution-at-all") is None


def test_rate_of_memory_counts_both_ways(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(rates, "_timed", lambda work: work() or 0.5)
    assert rates.measure_host(available_bytes=64 << 20) == 2 * (4 << 20) / 0.5


@pytest.mark.parametrize(("problem", "status"), [(None, 0), ("out of memory", 1)])
def test_status_and_rates(monkeypatch, capsys, root, problem, status):
    gpu = Gpu("A GPU", "580.1", 80 * GIB, "0000:01:00.0", Link(4, 16), None)
    measured = Rates(Link(4, 16), 25e9, 24e9, 23e9, 22e9, problem=problem)
    software = probe.read_software()
    versions = software.versions | {"vllm": "0.33.0", "vllm-moe-offload": "0.1.0"}
    facts = Facts(
        probe.read_host(6e10, root),
        probe.Software(versions, True, None, False),
        (gpu,),
        {gpu.address: measured},
    )
    monkeypatch.setattr(command, "_examine", lambda: facts)
    assert cli.main(["doctor", "--json"]) == status
    answer = json.loads(capsys.readouterr().out)
    assert answer["healthy"] == (status == 0)
    assert [each["copy_to_gpu_bytes_per_s"] for each in answer["gpus"]] == [25e9] * (status == 0)
    assert cli.main(["doctor"]) == status
    text = capsys.readouterr().out
    assert ("out of memory" in text) == (status == 1)
    assert "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled" in " ".join(text.split())
