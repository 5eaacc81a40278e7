"""The kernels one after another, as an engine runs them: a step of one layer.

Legend: T tokens, K choices a token, E experts, S slots, R staging rows, H hidden size,
I intermediate size, B bytes of a row.
"""

from dataclasses import dataclass

import pytest
import torch

from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.dispatch import Dispatch
from vllm_moe_offload.kernels.expert_mlp import ExpertWeights, TileConfig, combine, expert_mlp
from vllm_moe_offload.kernels.gather import gather
from vllm_moe_offload.kernels.resolve import IdLog, ResidencyTables, WorkList, resolve, wave_map

E, T, K, R = 6, 5, 2, 2
H, I = 32, 24  # noqa: E741
ROW_BYTES = 3 * 4096
NOBODY = -5
CONFIG = TileConfig(block_m=16, block_n=32, block_k=32, group_m=1, num_warps=4, num_stages=2)


def weights_of(rows: torch.Tensor) -> ExpertWeights:
    values = rows.view(torch.float32)
    w13, w2 = values[:, : 2 * I * H], values[:, 2 * I * H : 3 * I * H]
    return ExpertWeights(w13.unflatten(1, (2 * I, H)), w2.unflatten(1, (H, I)))


@dataclass
class Layer:
    """A layer's buffers; rows that nothing was gathered into hold NaN."""

    pool_EB: torch.Tensor
    num_slots: int

    def __post_init__(self) -> None:
        device = self.pool_EB.device
        self.slots_SB = torch.full((self.num_slots, ROW_BYTES), 0xFF, dtype=torch.uint8).to(device)
        self.staging_RB = torch.full((R, ROW_BYTES), 0xFF, dtype=torch.uint8).to(device)
        self.tables = ResidencyTables.empty(E, self.num_slots, device)
        self.work = WorkList.empty(E, device)
        self.lists = Dispatch.empty(T * K, E, CONFIG.block_m, device)
        self.row_of_E = torch.zeros(E, dtype=torch.int32, device=device)
        self.rows_TKH = torch.full((T, K, H), float("nan"), device=device)
        self.log_TK = torch.full((T, K), NOBODY, dtype=torch.int16, device=device)

    def step(self, x_TH, weight_TK, ids_TK, y_TH, *, evict: bool) -> None:
        work = self.work
        self.rows_TKH.fill_(float("nan"))
        log = IdLog(ids_TK, self.log_TK)
        resolve(ids_TK, self.tables, work, evict=evict, dispatch=self.lists, log=log)
        gather(
            self.pool_EB, self.slots_SB, work.load_expert_E, work.load_slot_E, work.num_loads
        )  # fmt: skip
        self._mlp(x_TH, weight_TK, ids_TK, self.tables.slot_of_E, self.slots_SB)
        for first in range(0, E, R):
            gather(
                self.pool_EB, self.staging_RB, work.stream_expert_E, None, work.num_streams,
                first=first, limit=R,
            )  # fmt: skip
            wave_map(work, first, self.row_of_E, rows=R)
            self._mlp(x_TH, weight_TK, ids_TK, self.row_of_E, self.staging_RB)
        combine(self.rows_TKH, ids_TK, y_TH)

    def _mlp(self, x_TH, weight_TK, ids_TK, row_of_E, rows) -> None:
        expert_mlp(
            x_TH, weight_TK, ids_TK, row_of_E, weights_of(rows), Activation("silu"),
            self.rows_TKH, dispatch=self.lists, config=CONFIG,
        )  # fmt: skip


@dataclass
class Inputs:
    x_TH: torch.Tensor
    weight_TK: torch.Tensor
    ids_TK: torch.Tensor
    y_TH: torch.Tensor

    @classmethod
    def draw(cls, seed: int, device: torch.device) -> "Inputs":
        generator = torch.Generator().manual_seed(seed)
        x_TH = torch.randn(T, H, generator=generator)
        weight_TK = torch.rand(T, K, generator=generator)
        ids_TK = torch.randint(-1, E, (T, K), generator=generator).int()
        y_TH = torch.full((T, H), float("nan"))
        return cls(*(tensor.to(device) for tensor in (x_TH, weight_TK, ids_TK, y_TH)))

    def copy_(self, other: "Inputs") -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))


@pytest.fixture(scope="module")
def pool_EB(device) -> torch.Tensor:  # noqa: N802
    values = torch.randn(E, ROW_BYTES // 4, generator=torch.Generator().manual_seed(0)) * 0.3
    return values.to(device).view(torch.uint8)


def expected(pool_EB: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Compute with every expert at hand, straight from the pool."""
    rows_TKH = inputs.x_TH.new_full((T, K, H), float("nan"))
    row_of_E = torch.arange(E, dtype=torch.int32, device=pool_EB.device)
    expert_mlp(
        inputs.x_TH, inputs.weight_TK, inputs.ids_TK, row_of_E, weights_of(pool_EB),
        Activation("silu"), rows_TKH, config=CONFIG,
    )  # fmt: skip
    y_TH = torch.empty_like(inputs.y_TH)
    combine(rows_TKH, inputs.ids_TK, y_TH)
    return y_TH


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("num_slots", [0, 1, 3, E])
def test_bits_do_not_depend_on_the_slots(num_slots, evict, pool_EB, device):
    layer = Layer(pool_EB, num_slots)
    for seed in range(3):
        inputs = Inputs.draw(seed, device)
        layer.step(inputs.x_TH, inputs.weight_TK, inputs.ids_TK, inputs.y_TH, evict=evict)
        assert torch.equal(inputs.y_TH, expected(pool_EB, inputs))
        assert torch.equal(layer.log_TK, inputs.ids_TK.short())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("num_slots", [0, 3, E])
def test_a_graph_serves_other_routings(num_slots, pool_EB, device):
    layer, inputs = Layer(pool_EB, num_slots), Inputs.draw(0, device)
    arguments = (inputs.x_TH, inputs.weight_TK, inputs.ids_TK, inputs.y_TH)
    layer.step(*arguments, evict=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.step(*arguments, evict=True)
    for seed in range(1, 1001):
        other = Inputs.draw(seed, device)
        inputs.copy_(other)
        graph.replay()
        assert torch.equal(inputs.y_TH, expected(pool_EB, other))
        assert torch.equal(layer.log_TK, other.ids_TK.short())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_a_step_never_waits_for_the_device(pool_EB, device):
    layer, inputs = Layer(pool_EB, 3), Inputs.draw(0, device)
    arguments = (inputs.x_TH, inputs.weight_TK, inputs.ids_TK, inputs.y_TH)
    layer.step(*arguments, evict=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.step(*arguments, evict=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
