"""Real vLLM engines on tiny checkpoints."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cpu_settings
import pytest

# Before vLLM is imported: it reads its environment once.
os.environ.update(cpu_settings.env("any"))


@pytest.fixture(autouse=True, scope="module")
def no_interpreter() -> Iterator[None]:
    """Run the engine's torch forms here, whatever other tests of this process chose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a family's checkpoint once a session."""
    from vllm_moe_offload.checkpoints import make_checkpoint

    made: dict[object, Path] = {}

    def make(family: str, **shape: object) -> Path:
        key = (family, *sorted(shape.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **shape)
        return made[key]

    return make
