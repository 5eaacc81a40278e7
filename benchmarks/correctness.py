"""Are the answers right on this machine? Tiny models, every residency, against stock vLLM.

    python benchmarks/correctness.py --out benchmarks/results/correctness.json

For each model and type: the tokens and log-probabilities must be the same to the last bit for
slots of 0, 25 and 100 % of the experts, and in float32 the tokens must be those of vLLM without
the plugin. On a GPU the pool must be pinned, and readable by the GPU under its own address.
"""

import argparse
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

SHARES = (0.0, 0.25, 1.0)
MAX_TOKENS = 16
PROMPTS = [[3 + (97 * i * i + 41 * i + 29 * n) % 500 for i in range(n)] for n in (3, 8, 17, 90)]


def generate(path: Path, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Tokens with their log-probabilities, and what the engine says of itself."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(path),
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.1,  # several of these share a GPU
        **kwargs,
    )
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [r.outputs[0] for r in llm.generate(requests, sampling, use_tqdm=False)]
    answers = [
        [(t, step[t].logprob) for t, step in zip(o.token_ids, o.logprobs, strict=True)]
        for o in outputs
    ]
    core = llm.llm_engine.engine_core.engine_core
    facts = _facts(core.model_executor.driver_worker.worker) if "plugin" in kwargs else {}
    vars(llm).clear()
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers, facts


def _facts(worker: Any) -> dict[str, Any]:
    """Check the engine inside its worker; the worker is in this process."""
    import torch

    (engine,) = worker.moe_offload_engines
    engine.check_integrity()
    stats = engine.stats()
    facts = {"runner": type(worker.model_runner).__module__, **stats.as_dict()}
    if engine.device.type == "cuda":
        mapped = [segment.device_rows(engine.device) for segment in engine.pool.segments]
        facts["pool_pinned"] = all(segment.rows_EB.is_pinned() for segment in engine.pool.segments)
        facts["pool_mapped"] = all(
            rows.is_cuda and torch.equal((rows + 0).cpu(), segment.rows_EB)
            for rows, segment in zip(mapped, engine.pool.segments, strict=True)
        )
    return facts


def compare(path: Path, dtype: str) -> dict[str, Any]:
    """All residencies of one checkpoint and type."""
    runs = {
        share: generate(
            path, dtype=dtype, plugin="moe-offload", moe_offload={"cache_fraction": share}
        )
        for share in SHARES
    }
    answers = [run[0] for run in runs.values()]
    row: dict[str, Any] = {
        "dtype": dtype,
        "bit_identical": all(answer == answers[0] for answer in answers),
        "engine": {str(share): facts for share, (_, facts) in runs.items()},
    }
    stock, _ = generate(path, dtype=dtype)
    row["tokens_equal_stock"] = _tokens(stock) == _tokens(answers[0])
    row["max_logprob_difference_to_stock"] = _first_difference(stock, answers[0])
    return row


def _tokens(answers: list[Any]) -> list[list[int]]:
    return [[token for token, _ in answer] for answer in answers]


def _first_difference(stock: list[Any], mine: list[Any]) -> float:
    """Largest difference of log-probabilities up to where the tokens part."""
    worst = 0.0
    for theirs, ours in zip(stock, mine, strict=True):
        for (their_token, a), (our_token, b) in zip(theirs, ours, strict=True):
            if their_token != our_token:
                break
            worst = max(worst, abs(a - b))
    return worst


def passed(row: dict[str, Any]) -> bool:
    """Whether a row holds everything that is promised for its type."""
    facts = row["engine"].values()
    return (
        row["bit_identical"]
        and (row["tokens_equal_stock"] or row["dtype"] != "float32")
        and all(fact.get("pool_pinned", True) and fact.get("pool_mapped", True) for fact in facts)
    )


def run_one(family: str, dtype: str) -> dict[str, Any]:
    """Make a checkpoint and compare it in one type."""
    from vllm_moe_offload.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), family, hidden_size=256, num_experts=16, top_k=4)
        return compare(path, dtype)


def main() -> int:
    """Run every family and type in a process of its own and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--families", default="all")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--runners", default="2", help="vLLM model runners, such as 1,2")
    parser.add_argument("--jobs", type=int, default=1, help="comparisons that run at once")
    parser.add_argument("--one", metavar="FAMILY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(run_one(args.one, args.dtypes)))
        return 0

    from machine import provenance

    from vllm_moe_offload.checkpoints import MOE_FAMILIES

    families = MOE_FAMILIES if args.families == "all" else args.families.split(",")
    jobs = itertools.product(families, args.dtypes.split(","), args.runners.split(","))
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: _in_a_process(*job), jobs))
    result = {**provenance(args.commit), "passed": all(row["passed"] for row in rows)}
    args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return 0 if result["passed"] else 1


def _in_a_process(family: str, dtype: str, runner: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "2")),
        # Triton multiplies float32 as TF32 unless told, which moves stock vLLM's tokens.
        "TRITON_F32_DEFAULT": "ieee",
    }
    if dtype == "float32":
        environment["VLLM_MLA_DISABLE"] = "1"  # no latent attention for this type on CUDA
    if shutil.which("nvidia-smi") is None:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # sampling would be compiled for a minute
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--one", family, "--dtypes", dtype, "--out", file.name]
        code = subprocess.run(command, env=environment, check=False).returncode
        row = {"family": family, "model_runner": f"V{runner}", "dtype": dtype, "exit": code}
        if code == 0:
            row |= json.loads(Path(file.name).read_text())
            row["passed"] = passed(row)
        else:
            row["passed"] = False
    print({name: value for name, value in row.items() if name != "engine"}, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
