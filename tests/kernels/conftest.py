"""Triton kernels on a GPU, or in Triton's interpreter where there is none."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so this must come before the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("kernels", deadline=None, max_examples=20, database=None)
hypothesis.settings.load_profile("kernels")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
