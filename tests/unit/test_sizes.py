import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.sizes import GIB, KIB, MIB, format_rate, format_size

UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (KIB, "1 KiB"),
        (640 * MIB, "640 MiB"),
        (100 * GIB, "100 GiB"),
        (5 * GIB // 4, "1.25 GiB"),
        (2000 * GIB, "2000 GiB"),
    ],
)
def test_sizes(num_bytes, text):
    assert format_size(num_bytes) == text


@given(st.integers(0, 1 << 50))
def test_a_size_is_told_to_two_digits(num_bytes):
    number, unit = re.fullmatch(r"(\d+|\d+\.\d?[1-9]) (\w+)", format_size(num_bytes)).groups()
    assert abs(float(number) * UNITS[unit] - num_bytes) <= 0.00501 * UNITS[unit]


def test_rates():
    texts = [format_rate(rate) for rate in (0, 1.5e6, 25e9)]
    assert texts == ["0 bytes/s", "1.5 MB/s", "25.0 GB/s"]
