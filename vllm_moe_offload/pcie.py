"""PCIe links: what generation and width carry, and what sysfs says of a device's link."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GIGATRANSFERS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
"""A second, by lane and generation, in 10^9; one transfer is a bit."""


@dataclass(frozen=True)
class Link:
    """A link's generation and number of lanes."""

    generation: int
    width: int

    @property
    def bytes_per_s(self) -> float:
        """What the lanes carry in one direction before packet headers.

        Generations 1 and 2 send 10 bits for 8, 3 to 5 send 130 for 128 (PCI Express Base
        Specification, section 4.2); generation 6 sends 242 of 256 bytes as payload.
        """
        bits = _GIGATRANSFERS[self.generation] * 1e9 * self.width
        efficiency = 0.8 if self.generation <= 2 else 128 / 130
        return bits / 8 * (242 / 256 if self.generation == 6 else efficiency)

    def __str__(self) -> str:
        """As people write it."""
        return f"gen{self.generation} x{self.width}"


def link_of(address: str, root: Path = Path("/")) -> Link | None:
    """Read the link of a device as it runs now; an idle GPU may have slowed it down.

    Args:
        address: of the device on the bus, such as 0000:01:00.0.
        root: where ``sys`` is mounted.

    Returns:
        None where sysfs does not show the device or does not know its link.
    """
    folder = device_folder(address, root)
    try:
        speed = float((folder / "current_link_speed").read_text().split()[0])
        width = int((folder / "current_link_width").read_text())
    except (OSError, ValueError, IndexError):
        return None
    generation = next((g for g, rate in _GIGATRANSFERS.items() if rate == speed), None)
    return Link(generation, width) if generation and width else None


def device_folder(address: str, root: Path = Path("/")) -> Path:
    """Where sysfs keeps what it knows of a device."""
    return root / "sys/bus/pci/devices" / short_address(address)


def device_link(device: Any) -> Link | None:
    """Read the link of a ``torch.device``, None if it is not on the bus."""
    address = device_address(device)
    return link_of(address) if address else None


def device_address(device: Any) -> str | None:
    """Where a ``torch.device`` is on the bus, None if it is not."""
    if device.type != "cuda":
        return None
    import torch

    properties = torch.cuda.get_device_properties(device)
    parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if any(part is None for part in parts):
        return None
    domain, bus, slot = parts
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def short_address(address: str) -> str:
    """Write an address as the kernel does; NVIDIA's tools write a longer domain in capitals."""
    domain, _, rest = address.lower().partition(":")
    return f"{domain[-4:]}:{rest}"
