"""Measure this plugin beside other ways to run the same model, in one run on one machine.

    python benchmarks/peers/run.py --out FILE
    python benchmarks/peers/run.py --render FILE
    python benchmarks/peers/run.py --plot FILE

A checkpoint of random weights is made in the shape that is asked for. One after the other the
systems serve it, each in processes of its own and with the same share of the experts on the GPU:
stock vLLM with everything there, this plugin, vLLM's ``--cpu-offload-gb`` and
``--offload-backend prefetch``, and as far as they are installed FreeToken, llama.cpp
(``--n-cpu-moe``), KTransformers and Accelerate. All get the same prompts and are greedy, and their
texts are compared with stock vLLM's. The file is written after each system, with a plot beside it.
Of those that are vLLM ``--together 4`` starts four at once; each is measured while the others wait.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # PYTHONSAFEPATH keeps it off

from machine import provenance
from shapes import SHAPES

from peers import checkpoint, table
from peers.agreement import Replies
from peers.measure import Questions, compare, measure
from peers.peer import Peer, Setup
from peers.plot import draw
from peers.prompts import prompts
from peers.systems import all_peers
from vllm_moe_offload.errors import OffloadError

_LONG_PROMPTS = 8


def main() -> int:
    """Measure the systems and write the file; or print one."""
    args = parse(sys.argv[1:])
    if args.render:
        print(table.markdown(json.loads(args.render.read_text())))
        return 0
    if args.plot:
        print(draw(json.loads(args.plot.read_text()), args.plot))
        return 0
    peers = [peer for peer in all_peers() if not args.only or peer.name in args.only]
    # What is running ends with us, and what was measured is shown, also where a time limit cuts in.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="peers-", dir=args.work) as work:
        try:
            with closing(run(args, peers, Path(work))) as results:
                for result in results:
                    args.out.write_text(json.dumps(result, indent=1) + "\n")
        except OffloadError as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("Interrupted; no server is left running.", file=sys.stderr)
    if not result:
        return 1
    show(result, args.out)
    states = [row["status"] for row in result["systems"]]
    return int(len(states) < len(peers) or "failed" in states)


def show(result: dict[str, Any], path: Path) -> None:
    """Print the table and draw the plot beside the file, with what is installed for that."""
    try:
        table.show(result)
    except ImportError:
        print(table.markdown(result))
    try:
        print(draw(result, path) or "Nothing to draw")
    except ImportError as error:
        print(f"Not drawn ({error}): --plot does so where matplotlib is installed")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    names = [peer.name for peer in all_peers()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="file of the results")
    add("--render", type=Path, metavar="FILE", help="print results as Markdown")
    add("--plot", type=Path, metavar="FILE", help="draw results beside their file")
    add("--shape", choices=SHAPES, default="qwen3-30b-a3b-16", help="model to make")
    add("--share", type=_share, default=0.25, help="part of the experts on the GPU, 0 to 1")
    add("--only", nargs="+", choices=names, metavar="SYSTEM", help=f"of {', '.join(names)}")
    add("--batches", type=_count, nargs="+", default=[1, 8, 32], help="sequences at once")
    add("--long-prompt", type=_count, help="tokens of the prompt whose first token is timed")
    add("--short-prompt", type=_count, default=32, help="tokens of the prompts that are decoded")
    add("--new-tokens", type=_count, default=64, help="tokens that they are continued by")
    add("--together", type=_count, default=1, help="vLLM servers that start at once; one is asked")
    add("--rounds", type=_count, default=3, help="times that all is timed; the median counts")
    add("--limit-s", type=float, default=float("inf"), help="begin no system after so many seconds")
    add("--start-limit-s", type=float, default=900, help="seconds until a system is ready")
    add("--disk-gb", type=float, default=60, help="what checkpoints may take of the disk")
    add("--work", type=Path, help="folder for them; they are removed at the end")
    add("--vllm-options", type=shlex.split, default=[], help="added to all vLLM command lines")
    add("--commit", help="revision, where the tree has no repository")
    args = parser.parse_args(arguments)
    if not (args.out or args.render or args.plot):
        parser.error("--out is needed to measure")
    return args


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def run(
    args: argparse.Namespace, peers: Sequence[Peer], work: Path
) -> Generator[dict[str, Any], None, None]:
    """Make the checkpoint and measure; gives all that there is after each system."""
    start = time.monotonic()
    setup = setup_of(args, work, has_gpu=gpu_bytes_known())
    needs_gguf = any(p.name == "llama.cpp" and p.absent(setup) is None for p in peers)
    checkpoint.make(
        setup.shape, setup.dtype, setup.checkpoint,
        disk_bytes=int(args.disk_gb * 1e9), copies=1 + needs_gguf,
    )  # fmt: skip
    questions = questions_for(setup)
    result: dict[str, Any] = {
        **provenance(args.commit),
        "shape_name": args.shape,
        "shape": setup.shape.as_dict(),
        "dtype": setup.dtype,
        "share": setup.share,
        "batches": list(setup.batches),
        "long_prompt": setup.long_prompt,
        "short_prompt": setup.short_prompt,
        "new_tokens": setup.new_tokens,
        "together": args.together,
        "systems": [],
    }
    reference: Replies = {}
    for together in starts(peers, args.together):
        seconds = time.monotonic() - start
        print(f"{', '.join(peer.name for peer in together)}, after {seconds:.0f} s", flush=True)
        if seconds > args.limit_s:
            found = iter([_out_of_time()] * len(together))
        else:
            found = measure(
                together, setup, questions, rounds=args.rounds, start_limit_s=args.start_limit_s
            )
        for peer, (row, replies) in zip(together, found, strict=True):
            named = {"system": peer.name, **row}
            if peer.name == all_peers()[0].name:
                reference, named["is_reference"] = replies, True
            else:
                compare(named, reference, replies)
            result["systems"].append(named)
            yield result


def _out_of_time() -> tuple[dict[str, Any], Replies]:
    return {"status": "out of time", "remedy": "Raise --limit-s."}, {}


def starts(peers: Sequence[Peer], together: int) -> list[list[Peer]]:
    """Which systems start at once: those that wait without disturbing the one that is measured."""
    found: list[list[Peer]] = []
    for peer in peers:
        last = found[-1] if found else []
        if last and len(last) < together and all(one.idles_quietly for one in (*last, peer)):
            last.append(peer)
        else:
            found.append([peer])
    return found


def setup_of(args: argparse.Namespace, work: Path, *, has_gpu: bool) -> Setup:
    """What is the same for all systems.

    On a CPU all compute in float32, in which two right implementations write the same.
    """
    return Setup(
        checkpoint=work / args.shape,
        shape=SHAPES[args.shape],
        work=work,
        share=args.share,
        dtype="bfloat16" if has_gpu else "float32",
        has_gpu=has_gpu,
        long_prompt=args.long_prompt or (8192 if has_gpu else 256),
        short_prompt=args.short_prompt,
        new_tokens=args.new_tokens,
        batches=tuple(sorted(set(args.batches))),
        vllm_options=tuple(args.vllm_options),
    )


def gpu_bytes_known() -> bool:
    """Whether there is a GPU: vLLM and nvidia-smi have to see it."""
    import torch

    return torch.cuda.is_available() and shutil.which("nvidia-smi") is not None


def questions_for(setup: Setup) -> Questions:
    """Prompts for all systems, encoded by the checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(setup.checkpoint / "tokenizer.json"))

    def make(count: int, tokens: int, seed: int) -> Any:
        return prompts(lambda text: tokenizer.encode(text).ids, count, tokens, seed)

    (long_warm_up,) = make(1, setup.long_prompt, 4)
    return Questions(
        long=make(_LONG_PROMPTS, setup.long_prompt, 1),
        short=make(setup.largest_batch, setup.short_prompt, 2),
        warm_up=make(setup.largest_batch, setup.short_prompt, 3),
        long_warm_up=long_warm_up,
    )


if __name__ == "__main__":
    sys.exit(main())
