"""Record which experts real prompts activate, and ask what other cache sizes would have done.

    python record_and_replay.py MODEL prompts.txt traces

The recording is made while the prompts are answered. Its replay needs neither model nor GPU:
``vllm-moe-offload simulate traces`` does the same with more policies, and
``vllm-moe-offload trace show traces`` tells what was recorded. A server that is given the same
folder starts with the experts in its slots that were hot here.
"""  # fmt: skip

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_moe_offload.simulate.replay import replay
from vllm_moe_offload.trace import Trace, load_all

SHARES = [0.125, 0.25, 0.5]
POLICIES = ["lru", "adaptive", "belady"]
"""The engine's two, and the best that knows the future."""


def main() -> None:
    """Record, then replay every recording of the folder."""
    args = parse()
    record(args.model, args.prompts.read_text().splitlines(), args.traces)
    for trace in load_all(args.traces):
        show(trace)


def record(model: str, prompts: list[str], folder: Path) -> None:
    """Answer the prompts with recording on."""
    # Written every second: whatever ends the workers, little is lost.
    options = {"trace_path": str(folder), "trace_interval_s": 1}
    llm = LLM(model, plugin="moe-offload", moe_offload=options, max_model_len=2048)
    llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0))
    # The recording is complete once the workers have ended.
    llm.llm_engine.engine_core.shutdown()


def show(trace: Trace) -> None:
    """Print hit ratios by policy and share of the experts that has a slot."""
    print(f"{trace.num_tokens} tokens through {trace.num_layers} MoE layers of {trace.model}")
    print("policy   ", *(f"{share:>7.1%}" for share in SHARES))
    for policy in POLICIES:
        result = replay(trace, policy, SHARES)
        print(f"{policy:9}", *(f"{result.hit_ratio(n):7.1%}" for n in range(len(SHARES))))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder or name on the hub")
    parser.add_argument("prompts", type=Path, help="file with a prompt a line")
    parser.add_argument("traces", type=Path, help="folder to record in, made if need be")
    return parser.parse_args()


if __name__ == "__main__":
    main()
