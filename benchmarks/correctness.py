"""Are the answers right on this machine? Tiny models, every residency, against stock vLLM.

    python benchmarks/correctness.py --out benchmarks/results/correctness.json

For each model and type: the tokens and log-probabilities must be the same to the last bit for
slots of 0, 25 and 100 % of the experts, and in float32 the tokens must be those of vLLM without
the plugin. On a GPU the pool must be pinned, and readable by the GPU under its own address.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off


class Case(NamedTuple):
    """One comparison: ``mode`` is eager or graphs (compiled, full and piecewise CUDA graphs)."""

    family: str
    mode: str
    dtype: str
    runner: str


HAS_GPU = shutil.which("nvidia-smi") is not None
SHARES = (0.0, 0.25, 1.0)
MAX_TOKENS = 16
PROMPTS = [[3 + (97 * i * i + 41 * i + 29 * n) % 500 for i in range(n)] for n in (3, 8, 17, 90)]


def generate(path: Path, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Tokens with their log-probabilities, and what the engine says of itself."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(path),
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
    facts = {"model_runner": type(worker.model_runner).__module__, **stats.as_dict()}
    if engine.device.type == "cuda":
        mapped = [segment.device_rows(engine.device) for segment in engine.pool.segments]
        facts["pool_pinned"] = all(segment.rows_EB.is_pinned() for segment in engine.pool.segments)
        facts["pool_mapped"] = all(
            rows.is_cuda and torch.equal((rows + 0).cpu(), segment.rows_EB)
            for rows, segment in zip(mapped, engine.pool.segments, strict=True)
        )
    return facts


def compare(path: Path, case: Case) -> dict[str, Any]:
    """All residencies of one checkpoint and type."""
    settings: dict[str, Any] = {"dtype": case.dtype, "enforce_eager": case.mode == "eager"}
    if case.mode == "graphs":
        settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4]}
    runs = {
        share: generate(
            path, plugin="moe-offload", moe_offload={"cache_fraction": share}, **settings
        )
        for share in SHARES
    }
    answers = [run[0] for run in runs.values()]
    row: dict[str, Any] = {
        "bit_identical": all(answer == answers[0] for answer in answers),
        "engine": {str(share): facts for share, (_, facts) in runs.items()},
    }
    stock, _ = generate(path, **settings)
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


def run_one(case: Case) -> dict[str, Any]:
    """Make a checkpoint and compare it."""
    from vllm_moe_offload.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), case.family, hidden_size=256, num_experts=16, top_k=4)
        return compare(path, case)


def cases(families: Sequence[str]) -> list[Case]:
    """Everything that this machine compares, the slowest first; a CPU has one runner, eager."""
    from vllm_moe_offload.checkpoints import MOE_FAMILIES

    graphs = [Case(family, "graphs", "bfloat16", "V2") for family in ("deepseek_v2", "qwen3_moe")]
    eager = [
        Case(family, "eager", dtype, "V2")
        for family in sorted(MOE_FAMILIES, key=lambda family: family != "deepseek_v2")
        for dtype in ("bfloat16", "float32")
    ]
    older = [Case(family, "eager", "float32", "V1") for family in ("gpt_oss", "qwen3_moe")]
    planned = graphs + eager + older if HAS_GPU else [c._replace(runner="V1") for c in eager]
    return [case for case in planned if case.family in (families or MOE_FAMILIES)]


def main() -> int:
    """Run every case in a process of its own; the result file grows with each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--families", nargs="*", default=[], help="only these; default all")
    parser.add_argument("--jobs", type=int, default=1, help="cases that run at once")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(run_one(Case(*args.one.split(",")))))
        return 0

    from machine import provenance

    origin, planned, rows = provenance(args.commit), cases(args.families), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(_in_a_process, planned):
            rows.append(row)
            all_passed = len(rows) == len(planned) and all(row["passed"] for row in rows)
            result = {**origin, "passed": all_passed, "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all_passed else 1


def _in_a_process(case: Case) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(case.runner == "V2")),
        # Triton multiplies float32 as TF32 unless told, which moves stock vLLM's tokens.
        "TRITON_F32_DEFAULT": "ieee",
    }
    if case.dtype == "float32":
        environment["VLLM_MLA_DISABLE"] = "1"  # no latent attention for this type on CUDA
    if not HAS_GPU:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # sampling would be compiled for a minute
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--one", ",".join(case), "--out", file.name]
        code = subprocess.run(command, env=environment, check=False).returncode
        row = {**case._asdict(), "exit": code, "passed": False}
        if code == 0:
            row |= json.loads(Path(file.name).read_text())
            row["passed"] = passed(row)
    print({name: value for name, value in row.items() if name != "engine"}, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
