from pathlib import Path

import pytest

from vllm_moe_offload.memory import HostMemory, available_host_memory

MIB = 1 << 20
UNLIMITED_V1 = 9223372036854771712


def tree(root: Path, files: dict[str, object]) -> Path:
    """A machine with 1000 MiB available, and these files."""
    meminfo = f"MemTotal: {4000 * 1024} kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Total: 0"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2(
    group: str, maximum: object, used_mib: int = 0, cache_mib: int = 0, active_mib: int = 0
) -> dict[str, object]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": maximum if maximum == "max" else maximum * MIB,
        f"{folder}/memory.current": used_mib * MIB,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache_mib * MIB}\n"
        f"active_file {active_mib * MIB}",
    }


def v1(
    group: str, maximum_mib: float, used_mib: int = 0, cache_mib: int = 0, active_mib: int = 0
) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": int(maximum_mib * MIB),
        f"{folder}/memory.usage_in_bytes": used_mib * MIB,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache_mib * MIB}\n"
        f"active_file 1\ntotal_active_file {active_mib * MIB}",
    }


def available_mib(root: Path) -> int:
    return available_host_memory(root).available // MIB


def test_this_machine():
    memory = available_host_memory()
    assert 0 < memory.available < 1 << 50
    assert memory.limited_by


def test_no_control_groups(tmp_path):
    memory = available_host_memory(tree(tmp_path, {}))
    assert memory.available == 1000 * MIB
    assert memory.limited_by == "free memory of the machine"


def test_limit_of_the_group(tmp_path):
    files = {"proc/self/cgroup": "0::/job", **v2("/job", 600, used_mib=100)}
    memory = available_host_memory(tree(tmp_path, files))
    assert memory.available == 500 * MIB
    assert memory.limited_by == f"the container's limit of {600 * MIB} bytes"


def test_machine_is_tighter_than_the_group(tmp_path):
    files = {"proc/self/cgroup": "0::/job", **v2("/job", 3000)}
    memory = available_host_memory(tree(tmp_path, files))
    assert memory.available == 1000 * MIB
    assert memory.limited_by == "free memory of the machine"


@pytest.mark.parametrize("tightest", ["", "/a", "/a/b", "/a/b/c"])
@pytest.mark.parametrize("version", [v1, v2])
def test_nested_groups(tmp_path, version, tightest):
    prefix = "0::" if version is v2 else "4:cpu,memory:"
    files: dict[str, object] = {"proc/self/cgroup": f"{prefix}/a/b/c"}
    for group in ("", "/a", "/a/b", "/a/b/c"):
        files |= version(group, 300 if group == tightest else 900)
    assert available_mib(tree(tmp_path, files)) == 300


def test_a_group_above_that_is_nearly_used_up(tmp_path):
    files = {
        "proc/self/cgroup": "0::/pod/job",
        **v2("/pod/job", 800, used_mib=10),
        **v2("/pod", 900, used_mib=850),
    }
    assert available_mib(tree(tmp_path, files)) == 50


def test_container_whose_own_path_does_not_exist(tmp_path):
    files = {"proc/self/cgroup": "0::/docker/0123abcd", **v2("", 400, used_mib=150)}
    assert available_mib(tree(tmp_path, files)) == 250


def test_path_outside_of_the_namespace(tmp_path):
    files = {"proc/self/cgroup": "0::/../../job", **v2("", 400)}
    assert available_mib(tree(tmp_path, files)) == 400


def test_max_is_no_limit(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a/b",
        **v2("/a/b", "max", used_mib=999),
        **v2("/a", 700, used_mib=100),
        **v2("", "max", used_mib=999),
    }
    assert available_mib(tree(tmp_path, files)) == 600


def test_only_max(tmp_path):
    files = {"proc/self/cgroup": "0::/a", **v2("/a", "max", used_mib=999)}
    assert available_mib(tree(tmp_path, files)) == 1000


@pytest.mark.parametrize(("version", "line"), [(v1, "9:memory:/a"), (v2, "0::/a")])
def test_page_cache_counts_as_available(tmp_path, version, line):
    files = {"proc/self/cgroup": line, **version("/a", 500, used_mib=450, cache_mib=300)}
    assert available_mib(tree(tmp_path, files)) == 350


@pytest.mark.parametrize(("version", "line"), [(v1, "9:memory:/a"), (v2, "0::/a")])
def test_files_that_were_read_twice_count_as_available(tmp_path, version, line):
    """As those of a checkpoint after some starts."""
    group = version("/a", 500, used_mib=450, cache_mib=100, active_mib=250)
    assert available_mib(tree(tmp_path, {"proc/self/cgroup": line, **group})) == 400


def test_over_the_limit(tmp_path):
    files = {"proc/self/cgroup": "0::/a", **v2("/a", 500, used_mib=600)}
    assert available_mib(tree(tmp_path, files)) == 0


def test_group_without_statistics(tmp_path):
    files = {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": 500 * MIB}
    assert available_mib(tree(tmp_path, files)) == 500


def test_version_1_unlimited(tmp_path):
    files = {
        "proc/self/cgroup": "9:memory:/a",
        **v1("/a", UNLIMITED_V1 / MIB, used_mib=990),
        **v1("", 700),
    }
    assert available_mib(tree(tmp_path, files)) == 700


def test_both_versions_and_other_controllers(tmp_path):
    lines = "12:cpuset:/x\n11:name=systemd:/x\n4:pids,memory:/job\n1:cpu,cpuacct:/x\n0::/job"
    files = {"proc/self/cgroup": lines, **v1("/job", 300), **v1("/x", 100), **v2("/job", 400)}
    assert available_mib(tree(tmp_path, files)) == 300


def test_path_with_a_colon(tmp_path):
    files = {"proc/self/cgroup": "0::/a:b", **v2("/a:b", 300)}
    assert available_mib(tree(tmp_path, files)) == 300


def test_workers_on_one_host_share_its_memory():
    alone = HostMemory(1000, "free memory of the machine")
    assert alone.shared_by(1) == alone
    shared = alone.shared_by(4)
    assert shared.available == 250
    assert "shared by 4 workers" in shared.limited_by
