"""Entry points that vLLM calls in each of its processes."""


def register() -> None:
    """Install the plugin's hooks. Idempotent, cheap, touches no GPU.

    Nothing changes for models that are served without ``--plugin moe-offload``.
    """
    from vllm_moe_offload import patches

    patches.install()
    patches.note_registration()


def claim_no_platform() -> None:
    """Install the hooks while vLLM looks for its platform, and claim none.

    vLLM loads general plugins only after ``LLM(...)`` has parsed its arguments, which is too
    late for ``plugin="moe-offload"`` to be one of them.
    """
    from vllm_moe_offload import patches

    patches.install()
