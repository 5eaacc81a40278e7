import pytest
import vllm

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches.version import check_version


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.0+cpu", "0.32.1rc1", "0.33.0", "0.33.9.post1", "0.33.1.dev5+g0123abc"],
)
def test_tested(version):
    check_version(version)


def test_installed():
    check_version(vllm.__version__)


UNTESTED = ["0.26.0", "0.31.9", "0.34.0", "0.34.1+cu130", "1.0.0", "0.3.2", "dev"]


@pytest.mark.parametrize("version", UNTESTED)
def test_untested(version, monkeypatch):
    monkeypatch.delenv("MOE_OFFLOAD_ANY_VLLM", raising=False)
    with pytest.raises(OffloadError) as error:
        check_version(version)
    message = str(error.value)
    assert f"vLLM = {version}: " in message
    assert "tested with vLLM" in message
    assert ">=0.32" in message
    assert "<0.34" in message
    assert "MOE_OFFLOAD_ANY_VLLM=1" in message


@pytest.mark.parametrize("version", UNTESTED)
def test_override(version, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_ANY_VLLM", "1")
    check_version(version)


@pytest.mark.parametrize("value", ["0", "", "yes"])
def test_override_is_exactly_one(value, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_ANY_VLLM", value)
    with pytest.raises(OffloadError):
        check_version("0.34.0")
