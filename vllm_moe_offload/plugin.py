"""Entry points that vLLM calls in each of its processes."""

_registered = False


def register() -> None:
    """Install the plugin's hooks. Idempotent, cheap, touches no GPU.

    Nothing changes for models that are served without ``--plugin moe-offload``.
    """
    global _registered  # noqa: PLW0603
    from vllm_moe_offload import patches

    patches.install()
    _registered = True


def registered() -> bool:
    """Whether vLLM has loaded the plugin in this process."""
    return _registered


def claim_no_platform() -> None:
    """Install the hooks while vLLM looks for its platform, and claim none.

    vLLM loads general plugins only after ``LLM(...)`` has parsed its arguments, which is too
    late for ``plugin="moe-offload"`` to be one of them.
    """
    from vllm_moe_offload import patches

    patches.install()
