from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload import pcie
from vllm_moe_offload.pcie import Link, device_link, link_of


@pytest.mark.parametrize(
    ("generation", "width", "gb_per_s"),
    [(1, 16, 4.0), (3, 16, 15.75), (4, 8, 15.75), (4, 16, 31.51), (5, 16, 63.02), (6, 16, 121.0)],
)
def test_rate_of_a_link(generation, width, gb_per_s):
    assert Link(generation, width).bytes_per_s / 1e9 == pytest.approx(gb_per_s, abs=0.01)


@pytest.fixture
def device(tmp_path):
    """Writes what sysfs says of a device."""
    folder = tmp_path / "sys/bus/pci/devices/0000:4b:00.0"
    folder.mkdir(parents=True)

    def write(**files: str):
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
        return tmp_path

    return write


@pytest.mark.parametrize("address", ["0000:4b:00.0", "00000000:4B:00.0"])
def test_link_in_sysfs(device, address):
    root = device(current_link_speed="16.0 GT/s PCIe", current_link_width="8")
    assert link_of(address, root) == Link(4, 8)
    assert str(link_of(address, root)) == "gen4 x8"


@pytest.mark.parametrize(
    ("speed", "width"), [("Unknown", "16"), ("16.0 GT/s PCIe", "0"), ("7.0 GT/s", "16"), ("", "")]
)
def test_link_that_sysfs_does_not_know(device, speed, width):
    root = device(current_link_speed=speed, current_link_width=width)
    assert link_of("0000:4b:00.0", root) is None
    assert link_of("0000:4c:00.0", root) is None


def test_link_of_a_torch_device(monkeypatch):
    assert device_link(torch.device("cpu")) is None
    properties = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x4B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    asked = []
    monkeypatch.setattr(pcie, "link_of", lambda address: asked.append(address) or Link(5, 16))
    assert device_link(torch.device("cuda", 0)) == Link(5, 16)
    assert asked == ["0001:4b:00.0"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert device_link(torch.device("cuda", 0)) is None
