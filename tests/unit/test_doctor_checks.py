"""Every verdict, from facts alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.doctor.checks import Finding, is_healthy, judge
from vllm_moe_offload.doctor.facts import Facts, Gpu, Host, Rates, Software
from vllm_moe_offload.pcie import Link
from vllm_moe_offload.sizes import GIB

LINK = Link(4, 16)
HOST = Host(
    memory_bytes=64 * GIB, available_bytes=60 * GIB, limited_by="free memory of the machine",
    cgroup_bytes=None, memlock_bytes=None, may_lock=False, huge_pages="madvise",
    nodes=frozenset({0}), own_nodes=frozenset({0}), bytes_per_s=60e9,
)  # fmt: skip
SOFTWARE = Software(
    versions={"vllm": "0.33.0", "vllm-moe-offload": "0.1.0", "torch": "2.14.0", "triton": None},
    is_registered=True, vllm_plugins=None, any_vllm=False,
)  # fmt: skip
GPU = Gpu("GPU of a test", "580.1", 80 * GIB, "0000:01:00.0", LINK, None)
RATES = Rates(LINK, 25e9, 24e9, 23e9, 22e9, pinned_bytes=512 << 20)
WELL = Facts(HOST, SOFTWARE, (GPU,), {GPU.address: RATES})
BARE = Facts(HOST, SOFTWARE)


def finding(facts: Facts, subject: str) -> Finding:
    (found,) = [each for each in judge(facts) if each.subject == subject]
    return found


def on(facts: Facts, **host) -> Facts:
    return replace(facts, host=replace(facts.host, **host))


def measured(**rates) -> Facts:
    return replace(WELL, rates={GPU.address: replace(RATES, **rates)})


def with_software(**fields) -> Facts:
    return replace(WELL, software=replace(SOFTWARE, **fields))


def with_version(name: str, version: str | None) -> Facts:
    return with_software(versions=SOFTWARE.versions | {name: version})


def test_machine_that_is_well():
    findings = judge(WELL)
    assert [each for each in findings if each.verdict != "ok" or each.remedy] == []
    assert [each.subject for each in findings] == [
        "GPU", "PCIe link", "copy to GPU", "copy to host", "gather to GPU", "gather to host",
        "NUMA", "host memory", "memory bandwidth", "cgroup limit", "locked memory", "huge pages",
        "vLLM", "plugin", "libraries",
    ]  # fmt: skip
    assert finding(WELL, "GPU").value == "GPU of a test, 80 GiB, driver 580.1"
    assert finding(WELL, "PCIe link").value == "gen4 x16, 31.5 GB/s each way"
    assert finding(WELL, "copy to GPU").value == "25.0 GB/s, 79% of gen4 x16"
    assert finding(WELL, "libraries").value == "torch 2.14.0"


def test_machine_without_a_gpu():
    found = finding(BARE, "GPU")
    assert (found.verdict, found.value) == ("slow", "none: vLLM would run on the CPU")
    assert is_healthy(judge(BARE))
    assert finding(BARE, "memory bandwidth").value.endswith("3.8 times gen3 x16")
    assert finding(BARE, "NUMA").verdict == "ok"


CASES = [
    (replace(BARE, smi_problem="no driver"), "GPU", "broken", "NVIDIA driver"),
    (measured(link=Link(4, 8)), "PCIe link", "slow", "all lanes"),
    (measured(link=Link(3, 16)), "PCIe link", "slow", "firmware"),
    (measured(copy_to_gpu=20e9), "copy to GPU", "slow", "NUMA node"),
    (measured(copy_to_host=20e9), "copy to host", "slow", "NUMA node"),
    (measured(gather_to_gpu=15e9), "gather to GPU", "slow", "NUMA node"),
    (measured(gather_to_host=15e9), "gather to host", "slow", "NUMA node"),
    (measured(problem="out of memory"), "transfers", "broken", "CUDA build"),
    (replace(WELL, rates={}), "transfers", "broken", "CUDA build"),
    (replace(WELL, rates={"other": RATES}), "transfers", "slow", "CUDA_VISIBLE_DEVICES"),
    (on(WELL, available_bytes=4 * GIB), "host memory", "slow", "Free or add memory"),
    (on(WELL, bytes_per_s=30e9), "memory bandwidth", "slow", "memory channels"),
    (on(BARE, bytes_per_s=15e9), "memory bandwidth", "slow", "memory channels"),
    (on(WELL, cgroup_bytes=20 * GIB), "cgroup limit", "slow", "docker run --memory"),
    (on(BARE, memlock_bytes=8 << 20), "locked memory", "slow", "ulimit -l unlimited"),
    (on(WELL, huge_pages="never"), "huge pages", "slow", "echo madvise"),
    (on(WELL, huge_pages=None), "huge pages", "slow", "kernel"),
    (with_version("vllm", None), "vLLM", "broken", "Install vllm"),
    (with_version("vllm", "0.31.2"), "vLLM", "broken", "MOE_OFFLOAD_ANY_VLLM=1"),
    (with_version("vllm-moe-offload", None), "plugin", "broken", "environment of vLLM"),
    (with_software(is_registered=False), "plugin", "broken", "environment of vLLM"),
    (with_software(vllm_plugins=""), "plugin", "broken", "Unset VLLM_PLUGINS"),
    (with_software(vllm_plugins="other"), "plugin", "broken", "Unset VLLM_PLUGINS"),
]


@pytest.mark.parametrize(("facts", "subject", "verdict", "remedy"), CASES)
def test_what_is_wrong(facts, subject, verdict, remedy):
    found = finding(facts, subject)
    assert found.verdict == verdict
    assert remedy in found.remedy
    assert is_healthy(judge(facts)) == (verdict != "broken")


@pytest.mark.parametrize(
    ("facts", "subject", "value"),
    [
        (on(WELL, cgroup_bytes=40 * GIB), "cgroup limit", "40 GiB of the machine's 64 GiB"),
        (on(WELL, cgroup_bytes=64 * GIB), "cgroup limit", "none"),
        (on(WELL, memlock_bytes=8 << 20), "locked memory",
         "limit of 8 MiB, but CUDA pinned 512 MiB under it"),
        (on(BARE, memlock_bytes=8 << 20, may_lock=True), "locked memory",
         "limit of 8 MiB, which does not bind this user"),
        (on(WELL, huge_pages="always"), "huge pages", "always: the host pool gets them"),
        (measured(link=None), "PCIe link", "gen4 x16, under load not known"),
        (measured(copy_to_gpu=22.1e9), "copy to GPU", "22.1 GB/s, 70% of gen4 x16"),
        (with_software(vllm_plugins="other,moe-offload"), "plugin", "0.1.0"),
        (with_version("vllm", "0.32.0+cpu"), "vLLM", "0.32.0+cpu"),
    ],
)  # fmt: skip
def test_what_is_well(facts, subject, value):
    assert finding(facts, subject) == Finding(subject, "ok", value)


def test_untested_vllm_that_the_user_insists_on():
    versions = SOFTWARE.versions | {"vllm": "0.34.0"}
    found = finding(with_software(versions=versions, any_vllm=True), "vLLM")
    assert (found.verdict, found.remedy) == ("slow", "Install vllm<0.34,>=0.32")


@pytest.mark.parametrize(
    ("node", "own", "verdict"), [(1, {1}, "ok"), (1, {0, 1}, "slow"), (1, {0}, "slow")]
)
def test_numa(node, own, verdict):
    facts = replace(WELL, gpus=(replace(GPU, numa_node=node),))
    facts = on(facts, nodes=frozenset({0, 1}), own_nodes=frozenset(own))
    found = finding(facts, "NUMA")
    assert found.verdict == verdict
    assert found.value == f"GPU at node 1, process on {','.join(map(str, sorted(own)))} of 0,1"
    assert verdict == "ok" or "numactl --cpunodebind=1 " in found.remedy


def test_several_gpus_are_told_apart():
    other = replace(GPU, address="0000:02:00.0")
    facts = replace(WELL, gpus=(GPU, other), rates={**WELL.rates, other.address: RATES})
    subjects = [each.subject for each in judge(facts)]
    assert [s for s in subjects if s.startswith("GPU")] == ["GPU 0000:01:00.0", "GPU 0000:02:00.0"]


@given(st.sampled_from([facts for facts, *_ in CASES]), st.sampled_from([WELL, BARE]))
def test_every_line_that_is_not_ok_has_a_remedy(facts, other):
    for each in judge(replace(facts, host=other.host)):
        assert bool(each.remedy) == (each.verdict != "ok"), each
        assert each.value
