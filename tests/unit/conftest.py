"""Tests of the package's own parts: no vLLM, no GPU."""

from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("unit", deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="module")
def torch_operations() -> Iterator[None]:
    """Take the specification, also where Triton's interpreter is switched on for other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield
