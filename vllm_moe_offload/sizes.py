"""Bytes as people read them: memory in powers of 1024, rates in powers of 1000."""

from rich.filesize import decimal

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def format_size(num_bytes: int) -> str:
    """An amount of memory in its largest unit, such as 1.25 GiB, 640 MiB or 0 bytes."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            # Two digits tell what is needed from what is free; whole numbers are given as such.
            return f"{num_bytes / unit:.2f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{num_bytes} bytes"


def format_rate(bytes_per_s: float) -> str:
    """A rate in its largest unit, such as 25.0 GB/s."""
    return f"{decimal(int(bytes_per_s))}/s"
