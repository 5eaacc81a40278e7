"""Which vLLM the patches were tested with."""

import os

from packaging.specifiers import SpecifierSet

from vllm_moe_offload.errors import OffloadError

TESTED = SpecifierSet(">=0.32,<0.34")

OVERRIDE = "MOE_OFFLOAD_ANY_VLLM"


def check_version(version: str) -> None:
    """Refuse a vLLM outside the tested range unless the user insists.

    Raises:
        OffloadError: the version is not tested and the override is not set.
    """
    if TESTED.contains(version, prereleases=True) or os.environ.get(OVERRIDE) == "1":
        return
    raise OffloadError(
        "vLLM",
        version,
        f"this version of the plugin is tested with vLLM {TESTED}",
        f"Install such a vLLM or a matching plugin, or set {OVERRIDE}=1 to try anyway",
    )
