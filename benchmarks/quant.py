"""Measure quantised experts against stock vLLM's backends for the same format, in one run.

    python benchmarks/run.py --suite quant --out benchmarks/results/quant.json

Models of real shapes without weights: Qwen3-30B-A3B with 16 layers in fp8 blocks and in 4-bit
groups of 128, gpt-oss-120b with 12 layers in MXFP4. A time of the plugin is set beside that of
the stock backend which was fastest in the case, all experts on the GPU.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import jobs
from requirements import Requirement, label, set_beside_bounds, value_of
from shapes import SHAPES, Shape
from suites import Job, Plan, chunk_of, decode, job, plugin, prefill

BATCHES = (1, 8, 32, 128)
SERVER = Path(__file__).with_name("quant_server.py")
TIME_LIMIT = 420.0
"""Seconds of one process: backends that repack or compile kernels take their time."""

_GATES = "re:.*mlp.gate$"


@dataclass(frozen=True)
class QuantShape(Shape):
    """A model whose experts are stored in a format.

    ``backends`` are those of stock vLLM that may be its fastest on some machine.
    """

    quantization: dict[str, Any] = field(default_factory=dict)
    backends: tuple[str, ...] = ("auto",)
    bits_per_weight: float = 8.0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as the checkpoint stores it, biases left out."""
        return int(3 * self.hidden * self.intermediate * self.bits_per_weight / 8)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "quantization_config": self.quantization}


@dataclass(frozen=True)
class GptOssShape(QuantShape):
    """A gpt-oss model."""

    def _config(self) -> dict[str, Any]:
        kinds = ("sliding_attention", "full_attention")
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "dtype": "bfloat16",
            "num_hidden_layers": self.num_layers,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "layer_types": [kinds[layer % 2] for layer in range(self.num_layers)],
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131_072,
            "rope_theta": 150_000.0,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
            "quantization_config": self.quantization,
        }  # fmt: skip


def _fp8(layers: int) -> dict[str, Any]:
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(layers)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *gates],
    }


def _all_but_experts(layers: int) -> list[str]:
    parts = ("mlp.gate", *(f"self_attn.{part}_proj" for part in "qkvo"))
    return ["lm_head", *(f"model.layers.{n}.{part}" for n in range(layers) for part in parts)]


def _w4a16(group: int, *ignored: str) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": group, "dynamic": False}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                        "output_activations": None},
        },
        "ignore": ["lm_head", _GATES, *ignored],
    }  # fmt: skip


_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
_QWEN = (16, 128, 8, 2048, 768, 32, 4)

QUANT_SHAPES: dict[str, QuantShape] = {
    "qwen3-30b-a3b-16-fp8": QuantShape(
        *_QWEN, quantization=_fp8(16), backends=("auto", "triton"),
        bits_per_weight=8 + 32 / 128**2,
    ),
    "qwen3-30b-a3b-16-w4a16": QuantShape(
        *_QWEN, quantization=_w4a16(128), backends=("auto", "triton"),
        bits_per_weight=4 + 16 / 128,
    ),
    "gpt-oss-120b-12-mxfp4": GptOssShape(
        12, 128, 4, 2880, 2880, 64, 8, head_dim=64, vocabulary=201_088, quantization=_MXFP4,
        backends=("auto", "marlin"), bits_per_weight=4 + 8 / 32,
    ),
    # For trying the suite out where there is no GPU.
    "tiny-fp8": QuantShape(
        2, 16, 4, 128, 128, 4, 2, head_dim=32, vocabulary=512,
        quantization={**_fp8(2), "modules_to_not_convert": _all_but_experts(2)},
    ),
    "tiny-mxfp4": GptOssShape(
        2, 16, 4, 128, 128, 4, 2, head_dim=32, vocabulary=512, quantization=_MXFP4,
        bits_per_weight=4 + 8 / 32,
    ),
    "tiny-w4a16": QuantShape(
        2, 16, 4, 128, 64, 4, 2, head_dim=32, vocabulary=512,
        quantization=_w4a16(32, "re:.*self_attn.*"), bits_per_weight=4 + 16 / 32,
    ),
}  # fmt: skip


def quant(name: str, options: dict[str, Any]) -> list[Job]:
    """What the table of targets needs, on one shape."""
    shape, tiny = QUANT_SHAPES[name], name.startswith("tiny")
    chunk = chunk_of(name)

    def plans() -> list[Plan]:
        found = [decode(batch, 4 if tiny else 24) for batch in BATCHES]
        return [*found, prefill(chunk, 1 if tiny else 3)]

    found = []
    for backend in shape.backends:
        asked = job(f"{name}, stock {backend}", "resident", 1.0, name, plans())
        asked["settings"] |= {} if backend == "auto" else {"moe_backend": backend}
        found.append(asked)
    for share in (1.0, 0.25):
        found.append({**plugin(share, name, plans(), options), "name": f"{name}, plugin {share}"})
    if tiny:
        for each in found:
            each["settings"]["dtype"] = "bfloat16"
    return found


def requirements(chunk: int) -> list[Requirement]:
    """The targets: shares in slots against the fastest stock backend and the link."""
    resident = "t / t_res"
    added, larger = "(t_res + bytes / BW) / t", "max(t_res, bytes / BW) / t"
    quarter = (0.25,)
    return [
        Requirement(
            "100 % in slots, decode batch 1 / 8 / 32", "decode", (1, 8, 32), resident, 1.10
        ),
        Requirement("25 % in slots, decode batch 1 and 8", "decode", (1, 8), added, 0.90, quarter),
        Requirement("25 %, decode batch 32 and 128", "decode", (32, 128), larger, 0.85, quarter),
        Requirement(f"25 %, {chunk}-token prefill", "prefill", (chunk,), larger, 0.92, quarter),
    ]


def fastest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave of the stock rows of a case the one with the shortest time."""
    kept: dict[Any, dict[str, Any]] = {}
    others = []
    for row in rows:
        if row["server"] != "resident" or row["case"] == "start":
            others.append(row)
            continue
        case = row["shape"], row["case"], row.get("batch"), row.get("tokens")
        if case not in kept or row["seconds"] < kept[case]["seconds"]:
            kept[case] = row
    return [*kept.values(), *others]


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target of every shape, with the values and whether they keep it; None if unknown."""
    table = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        for requirement in requirements(chunk_of(name)):
            found = [r for r in rows if r["shape"] == name and requirement.covers(r)]
            values = {label(row): value_of(requirement, row) for row in found}
            known = [v for v in values.values() if v is not None]
            kept = all(requirement.holds(v) for v in known)
            complete = len(known) == requirement.cases
            table.append(
                {
                    "case": f"{name}: {requirement.text}",
                    "target": requirement.target,
                    "values": values,
                    "passed": kept if complete or not kept else None,
                }
            )
    return table


def real_shapes() -> list[str]:
    """Names of the shapes that are not for trying the suite out."""
    return [name for name in QUANT_SHAPES if not name.startswith("tiny")]


def measure(
    out: Path,
    names: Iterable[str],
    options: dict[str, Any],
    origin: dict[str, Any],
    *,
    together: int = 1,
) -> dict[str, Any]:
    """Run the suite; the file holds what there is after each process.

    Args:
        out: where the result goes.
        names: shapes.
        options: of the plugin.
        origin: where and of what the result is.
        together: servers that start at once; one is measured.
    """
    jobs.SCRIPT = str(SERVER)
    SHAPES.update(QUANT_SHAPES)
    names = list(names)
    rows: list[dict[str, Any]] = []
    processes: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    start = time.monotonic()
    memory = jobs.Memory.of_this_machine(together)
    planned = [job for name in names for job in quant(name, options)]
    for done in jobs.run_all(planned, memory, time_limit=TIME_LIMIT):
        rows += done.pop("rows")
        processes.append(done)
        state = "done" if done["exit"] == 0 else f"failed ({done['exit']})\n{done['log']}"
        elapsed = time.monotonic() - start
        print(f"[{elapsed:4.0f} s] {done['configuration']}: {state}", flush=True)
        rates = [p["copy_gb_s"] for p in processes if p["copy_gb_s"]]
        judged = set_beside_bounds(fastest(rows), max(rates, default=float("inf")) * 1e9)
        result = {
            **origin,
            "suite": "quant",
            "copy_gb_s": rates,
            "shapes": {name: QUANT_SHAPES[name].as_dict() for name in names},
            "targets": targets(judged),
            "rows": judged,
            "all_rows": rows,
            "processes": processes,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: list[str]) -> int:
    """Measure the real shapes, or the ones that are named after the file."""
    from machine import provenance

    out, *named = arguments
    result = measure(Path(out), named or real_shapes(), {}, provenance(None))
    for target in result["targets"]:
        print(json.dumps(target))
    return int(any(target["passed"] is False for target in result["targets"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
