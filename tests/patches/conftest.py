"""Real vLLM on the CPU: its arguments and configurations, no engine."""

import os
from collections.abc import Callable
from pathlib import Path

import cpu_settings
import hypothesis
import pytest

# Before vLLM is imported: it reads its environment once.
os.environ.update(cpu_settings.env("any"))

hypothesis.settings.register_profile("patches", deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("patches")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the smallest checkpoint of a family, once a session."""
    from vllm_moe_offload.checkpoints import make_checkpoint

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(
                tmp_path_factory.mktemp(family),
                family,
                num_layers=2,
                hidden_size=64,
                intermediate_size=32,
            )
        return made[family]

    return make
