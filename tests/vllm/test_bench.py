"""What vLLM's own benchmark prints with the plugin."""

import os
import re
import subprocess
import sys
from pathlib import Path

from cpu_settings import env


def test_throughput_ends_with_the_counts(checkpoint):
    command = [Path(sys.executable).with_name("vllm"), "bench", "throughput",
               "--model", checkpoint("olmoe"), "--plugin", "moe-offload",
               "--moe-offload-cache-fraction", "0.25", "--dtype", "float32", "--enforce-eager",
               "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20),
               "--dataset-name", "random", "--random-input-len", "16",
               "--random-output-len", "8", "--num-prompts", "4"]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, **env("olmoe")}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    lines = re.findall(r"\d% of (\d+) active experts were in slots, (\d+) missed", result.stdout
                       + result.stderr)  # fmt: skip
    (active, missed) = map(int, lines[-1])
    assert active >= missed > 0
