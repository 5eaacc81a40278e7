"""Continue every line of a file with a model whose experts do not fit into GPU memory.

    python offline_batch.py MODEL prompts.txt answers.jsonl

All prompts are given to vLLM at once, which batches them by itself: with many sequences at once
an expert that was moved is used for several of them. The answers are one JSON object a line.
"""  # fmt: skip

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    """Read prompts, generate, write answers, and tell what the experts' cache did."""
    args = parse()
    prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    options = {} if args.cache_fraction is None else {"cache_fraction": args.cache_fraction}
    llm = LLM(
        args.model,
        plugin="moe-offload",
        moe_offload=options,
        max_model_len=args.max_model_len,
    )
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=0)
    answers = llm.generate(prompts, sampling)
    with args.answers.open("w") as file:
        for answer in answers:
            line = {"prompt": answer.prompt, "text": answer.outputs[0].text}
            file.write(json.dumps(line) + "\n")
    # One entry a worker; docs/metrics.md says what is in it.
    for stats in llm.collective_rpc("moe_offload_stats"):
        share = stats["hits"] / stats["active"]
        print(f"{share:.1%} of {stats['active']} active experts were in one of "
              f"{stats['slots']} slots, {stats['bytes_moved'] / 2**30:.2f} GiB moved")  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder or name on the hub")
    parser.add_argument("prompts", type=Path, help="file with a prompt a line")
    parser.add_argument("answers", type=Path, help="file to write")
    parser.add_argument("--cache-fraction", type=float, help="default: what the KV cache leaves")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer; default: 64")
    parser.add_argument("--max-model-len", type=int, default=2048, help="default: 2048")
    return parser.parse_args()


if __name__ == "__main__":
    main()
