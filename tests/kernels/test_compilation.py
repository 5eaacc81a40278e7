"""Compiling ahead with Triton's own compiler, which needs no GPU, in a process of its own."""

import os
import subprocess
import sys

PROGRAM = '''
import re
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    """What a launch asks before it compiles; nothing that could run anything."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())

from triton import knobs
from vllm_moe_offload.kernels import compilation
from vllm_moe_offload.kernels.expert_mlp import combine
from vllm_moe_offload.kernels.resolve import WorkList, wave_map

names = []
knobs.runtime.jit_post_compile_hook = lambda *_, **event: names.append(event["fn"].name)

def launch():
    combine(torch.ones(3, 2, 16), torch.zeros(3, 2, dtype=torch.int32), y_TH)
    wave_map(WorkList.empty(8, torch.device("cpu")), 0, row_of_E, rows=2)

y_TH, row_of_E = torch.full((3, 16), 7.0), torch.full((8,), 5, dtype=torch.int32)
source = "".join(file.read_text() for file in Path(compilation.__file__).parent.glob("*.py"))
launched = set(re.findall(r"(\\w+)\\[.*\\]\\($", source, re.M))
assert len(launched) > 10
assert launched == {kernel.fn.__name__ for kernel in compilation.kernels()}
with compilation.compiling(2) as mode:
    launch()
assert len(mode.future_kernels) == 2
assert sorted(name.rpartition(".")[2] for name in names) == ["combine_kernel", "wave_map_kernel"]
assert (y_TH == 7).all() and (row_of_E == 5).all(), "something was launched"
with compilation.compiling(2) as mode:
    launch()
assert len(mode.future_kernels) == 0, "compiled twice"
assert len(names) == 2
for kernel in compilation.kernels():
    assert "run" not in vars(kernel), "a kernel is still not launched"
'''


def test_launches_compile_and_compute_nothing(tmp_path):
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
