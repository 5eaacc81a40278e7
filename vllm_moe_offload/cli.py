"""The command ``vllm-moe-offload``."""

import argparse
import sys
from collections.abc import Sequence

from vllm_moe_offload import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-moe-offload", description="Tools around expert offloading for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_subparsers(dest="command", required=True)
    parser.parse_args(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
