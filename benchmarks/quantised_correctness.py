"""Are quantised experts right on this machine? Tiny models of every format, every residency.

    python benchmarks/quantised_correctness.py --jobs 16 --out benchmarks/results/FILE.json

Three questions a format, with the phases of ``correctness.py``:

- In bfloat16, are tokens and log-probabilities the same to the last bit for slots of 0, 25 and
  100 % of the experts?
- In float32, with activations left unrounded, are the tokens those of stock vLLM on the weights
  that the codes mean?
- In bfloat16, what does stock vLLM say with its own kernel for the format? Both round in places of
  their own, so that tokens may part where two are as likely as each other within ``ROUNDING``; they
  must not part elsewhere, nor log-probabilities before that. Where they do, because stock vLLM
  gives two weights one scale or both round inputs to 8 bits, the plugin must be as near to what the
  codes mean as stock vLLM is. The model has one layer: rounding in the first would choose other
  experts in the second one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from answers import (
    difference,
    generate,
    mean_apart,
    of_both,
    plugin,
    tokens_of,
    until_tokens_part,
)
from correctness import HAS_GPU, what_failed

from vllm_moe_offload.demo.agreement import ROUNDING, steps_apart

SHARES = (0.0, 0.25, 1.0)
BACKENDS = {
    "fp8": "triton", "fp8-channel": "triton", "fp8-tensor": "triton",
    "w4a16": "triton", "w4a16-zeros": "triton", "w4a16-channel": "marlin", "w8a16": "triton",
    "gptq": "marlin", "gptq-8bit": "marlin", "awq": "emulation",
    "nvfp4": "marlin", "nvfp4-packed": "marlin",
    "mxfp4": "triton", "mxfp4-by-expert": "marlin",
}  # fmt: skip
"""The backend of stock vLLM by format."""

AS_NEAR = 1.1
"""Times stock vLLM's mean distance from what the codes mean: as far as chance goes in a few hundred
steps."""

QUANTISATIONS = ("fp8", "compressed-tensors", "auto_gptq", "auto_awq", "moe_wna16",
                 "gpt_oss_mxfp4", "mxfp4", "modelopt_fp4")  # fmt: skip


def run_one(form: str) -> dict[str, Any]:
    """Make the checkpoints of a format and run everything that is compared."""
    from vllm_moe_offload.checkpoints import make_checkpoint
    from vllm_moe_offload.quantised_checkpoints import quantise_checkpoint

    family = "gpt_oss" if form == "mxfp4" else "qwen3_moe"
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, shallow_source = (
            make_checkpoint(
                Path(folder, f"{layers} layers"), family, hidden_size=256, intermediate_size=128,
                num_experts=16, top_k=4, num_layers=layers,
            )
            for layers in (2, 1)
        )  # fmt: skip
        stored = quantise_checkpoint(source, Path(folder, "stored"), form)
        decoded = quantise_checkpoint(source, Path(folder, "decoded"), form, decoded=True)
        shallow = quantise_checkpoint(shallow_source, Path(folder, "shallow"), form)
        shallow_decoded = quantise_checkpoint(
            shallow_source, Path(folder, "shallow, decoded"), form, decoded=True
        )
        eager = {"enforce_eager": True}
        for share in SHARES:
            runs[f"share {share}"] = _start(
                f"share {share}", stored, dtype="bfloat16", **eager, **plugin(share)
            )
        runs["one layer"] = _start("one layer", shallow, dtype="bfloat16", **eager, **plugin(0.25))
        try:
            runs["stock"] = _start(
                "stock", shallow, dtype="bfloat16", moe_backend=BACKENDS[form], **eager
            )
        except Exception as error:
            runs["stock"] = {"error": f"{type(error).__name__}: {error}"[:500]}
        _allow_float32()
        runs["float32"] = _start("float32", stored, dtype="float32", **eager, **plugin(0.25))
        runs["decoded"] = _start("decoded", decoded, dtype="float32", **eager)
        runs["exact"] = _start("exact", shallow_decoded, dtype="float32", **eager)
    return runs


def _start(name: str, path: Path, **settings: Any) -> dict[str, Any]:
    print(f"start: {name}", flush=True)  # the last one in a log is the one that failed
    return generate(path, **settings)


def _allow_float32() -> None:
    """Let vLLM's formats, which want 16 bits, take float32, and leave activations unrounded."""
    import torch
    from vllm.model_executor.layers.quantization import get_quantization_config

    from vllm_moe_offload import layer

    types = classmethod(lambda _: [torch.float32, torch.bfloat16, torch.float16])
    for name in QUANTISATIONS:
        get_quantization_config(name).get_supported_act_dtypes = types
    layer.has_e4m3 = lambda _: False


def judge(form: str, runs: dict[str, Any]) -> dict[str, Any]:
    """Compare the runs of a format."""
    first = runs[f"share {SHARES[0]}"]
    shares = {name: difference(first, run) for name, run in runs.items() if "share" in name}
    stock, mine = runs["stock"], runs["one layer"]
    float32, decoded = runs["float32"], runs["decoded"]
    row: dict[str, Any] = {
        "format": form,
        "bit_identical": not any(shares.values()),
        "differences": {name: found for name, found in shares.items() if found},
        "float32_tokens_equal_stock": tokens_of(float32) == tokens_of(decoded),
        "float32_max_logprob_difference": until_tokens_part(decoded, float32),
        "stock_backend": BACKENDS[form],
        "engine": {name: run["facts"] for name, run in runs.items() if "facts" in run},
    }
    agrees = False
    if "error" in stock:
        row["stock_error"] = stock["error"]
    else:
        apart = apart_by(stock, mine)
        off, stock_off = (mean_apart(run, runs["exact"]) for run in (mine, stock))
        agrees = apart <= ROUNDING or off <= AS_NEAR * stock_off
        row |= {
            "tokens_equal_stock": tokens_of(stock) == tokens_of(mine),
            "requests_equal_stock": same_requests(stock, mine),
            "max_difference_to_stock": apart,
            "mean_difference_to_exact": {"plugin": off, "stock": stock_off},
        }
    row["passed"] = (
        row["bit_identical"]
        and row["float32_tokens_equal_stock"]
        and agrees
        and all(facts.get("pool_mapped", True) for facts in row["engine"].values())
    )
    return row


def apart_by(stock: dict[str, Any], mine: dict[str, Any]) -> float:
    """Largest difference between the answers of all phases, see ``steps_apart``."""
    return max(steps_apart(*steps) for steps in of_both(mine, stock))


def same_requests(stock: dict[str, Any], mine: dict[str, Any]) -> str:
    """How many requests have the same tokens."""
    same = [
        [token for token, _ in ours] == [token for token, _ in theirs]
        for ours, theirs in of_both(mine, stock)
    ]
    return f"{sum(same)} of {len(same)}"


def main() -> int:
    """Run every format in a process of its own; the result file grows with each."""
    args = parse(sys.argv[1:])
    if args.one:
        args.out.write_text(json.dumps(run_one(args.one)))
        return 0

    from machine import provenance

    origin, rows = provenance(args.commit), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for form, row in zip(args.formats, pool.map(_in_a_process, args.formats), strict=True):
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "engine"}), flush=True)
            passed = len(rows) == len(args.formats) and all(r["passed"] for r in rows)
            result = {**origin, "passed": passed, "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            assert form == row["format"]
    return 0 if passed else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--formats", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--jobs", type=int, default=1, help="processes that run at once")
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_a_process(form: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(HAS_GPU)),
        # Triton multiplies float32 as TF32 unless told, which moves stock vLLM's tokens.
        "TRITON_F32_DEFAULT": "ieee",
    }
    if not HAS_GPU:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # sampling would be compiled for a minute
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "runs.json"), Path(folder, "log")
        command = [sys.executable, __file__, "--one", form, "--out", str(out)]
        with log.open("w") as file:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        print(f"{form}: exit status {code}", flush=True)
        if code:
            text = what_failed(log.read_text(errors="replace"))
            return {"format": form, "passed": False, "exit": code, "log": text}
        return judge(form, json.loads(out.read_text()))


if __name__ == "__main__":
    sys.exit(main())
