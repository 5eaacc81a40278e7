"""Run a checkpoint in vLLM, in this process or in one of its own."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from cpu_settings import env, llm_kwargs
from reference import Generation

PLUGIN = "moe-offload"


def offloaded(**options: Any) -> dict[str, Any]:
    """Keyword arguments of ``LLM`` that turn the plugin on."""
    return {"plugin": PLUGIN, "moe_offload": options}


@contextmanager
def engine(path: Path, family: str, **kwargs: Any) -> Iterator[Any]:
    """An ``LLM`` in this process, taken down completely at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with _small_heap(), _kernels_of_the_cpu_once():
        llm = LLM(str(path), **{**llm_kwargs(family), "max_model_len": 256, **kwargs})
        try:
            yield llm
        finally:
            # The caller's variable may outlive the block, and a late finalizer would take down the
            # process groups of the next engine.
            vars(llm).clear()
            gc.collect()
            cleanup_dist_env_and_memory()


@contextmanager
def _small_heap() -> Iterator[None]:
    """Collect garbage among what is made inside only.

    vLLM collects nine times in the life of an engine, and each time would walk through all that
    the process has imported, which took longer than everything else. It freezes its own objects
    meanwhile, which must not be: they would stay for good.
    """
    gc.collect()
    gc.freeze()
    with mock.patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
        yield


@contextmanager
def _kernels_of_the_cpu_once() -> Iterator[None]:
    """Leave kernels that the process has replaced by those of the CPU as they are.

    vLLM looks for them among all names of all modules at every start of an engine, which took
    most of it, and puts one replacement around the other.
    """
    from vllm.triton_utils import dispatcher

    register = dispatcher.register_kernels

    def register_new(overrides: Mapping[str, Any]) -> None:
        if not overrides.keys() <= dispatcher._registry.keys():
            register(overrides)

    with mock.patch.object(dispatcher, "register_kernels", register_new):
        yield


def generate(
    llm: Any, prompts: Sequence[list[int]], max_tokens: int, *, logprobs: int | None = 5
) -> list[Generation]:
    """Continue each prompt greedily by exactly ``max_tokens`` tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=logprobs
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [r.outputs[0] for r in llm.generate(requests, sampling, use_tqdm=False)]
    return [_generation(output) for output in outputs]


def _generation(output: Any) -> Generation:
    steps = output.logprobs or []
    return Generation(
        token_ids=list(output.token_ids),
        logprobs=[
            step[token].logprob for token, step in zip(output.token_ids, steps, strict=bool(steps))
        ],
        top_logprobs=[{token: entry.logprob for token, entry in step.items()} for step in steps],
    )


def tokens(generations: Sequence[Generation]) -> list[list[int]]:
    """Only the token ids."""
    return [generation.token_ids for generation in generations]


def generate_in_subprocess(
    path: Path,
    family: str,
    prompts: Sequence[list[int]],
    max_tokens: int,
    *,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Generation]:
    """Like ``engine`` and ``generate``, for settings that belong to a whole process."""
    job = {"path": str(path), "family": family, "prompts": list(prompts)}
    job |= {"max_tokens": max_tokens, "kwargs": kwargs}
    workers = kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)
    variables = env(family, workers) | (environment or {})
    variables["PYTHONPATH"] = str(Path(__file__).parent)
    # The workers of vLLM leave their sockets behind.
    with TemporaryDirectory() as scratch:
        result = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(job),
            env={**os.environ, **variables, "TMPDIR": scratch},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    line = result.stdout.rsplit("RESULT ", 1)[1].splitlines()[0]
    return [Generation(g["token_ids"], g["logprobs"], []) for g in json.loads(line)]


def _main() -> None:
    job = json.load(sys.stdin)
    with engine(Path(job["path"]), job["family"], **job["kwargs"]) as llm:
        results = generate(llm, job["prompts"], job["max_tokens"])
    print(
        "RESULT "
        + json.dumps([{"token_ids": g.token_ids, "logprobs": g.logprobs} for g in results])
    )


if __name__ == "__main__":
    _main()
