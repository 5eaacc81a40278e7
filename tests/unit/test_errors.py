import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError


def test_message():
    error = OffloadError("gpu_gb", -1, "it is negative", "Give a positive number")
    assert str(error) == "moe-offload: gpu_gb = -1: it is negative. Give a positive number."
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("transport", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("value", [-1, None, "x", ["a"]], ids=repr)
def test_survives_transport(transport, value):
    error = OffloadError("gpu_gb", value, "it is wrong", "Change it")
    again = transport(error)
    assert type(again) is OffloadError
    assert str(again) == str(error)
    assert (again.subject, again.value, again.problem, again.remedy) == (
        "gpu_gb", value, "it is wrong", "Change it",
    )  # fmt: skip


def test_subclass_survives_transport():
    again = pickle.loads(pickle.dumps(_SpecialError("a", 1, "b", "c")))
    assert type(again) is _SpecialError


def test_crosses_processes():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        future = executor.submit(MoeOffloadConfig.parse, {"staging_mb": -3})
        error = future.exception(timeout=60)
    assert type(error) is OffloadError
    assert error.subject == "staging_mb"
    assert error.value == -3
    assert "staging_mb = -3: " in str(error)
    assert "Give a positive number of MiB" in str(error)


class _SpecialError(OffloadError):
    pass
