"""vLLM's fused-MoE layer made offload-aware: its quantisation method with another storage.

The method object that vLLM chose keeps its class name, because vLLM's weight loaders look at
it; a mixin in front of it puts the weights into the host pool and hands the routed tokens to the
engine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_moe_offload import fill
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels import activation
from vllm_moe_offload.kernels.expert_mlp import TileConfig
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing

logger = init_logger("vllm.moe_offload")

_building: ContextVar[OffloadEngine | None] = ContextVar("moe_offload_engine", default=None)


@contextmanager
def building(engine: OffloadEngine) -> Iterator[None]:
    """Make an engine the one that MoE layers built inside the context join."""
    token = _building.set(engine)
    try:
        yield
    finally:
        _building.reset(token)


def building_engine() -> OffloadEngine | None:
    """Return the engine of the model that is being built, if it is offloaded."""
    return _building.get()


def offload(
    method: Any,
    engine: OffloadEngine,
    prefix: str,
    quantization: str,
    tiles: Callable[[int], TileConfig] | None = None,
) -> None:
    """Turn a layer's quantisation method into an offload-aware one, in place.

    Args:
        method: what vLLM chose for the layer.
        engine: the engine that the layer joins.
        prefix: the layer's name in the model.
        quantization: what vLLM calls the format of the experts, for the message.
        tiles: tuned tiles of the grouped product by number of tokens.

    Raises:
        OffloadError: the experts are quantised in a way that cannot be offloaded.
    """
    kind = type(method)
    if not isinstance(method, UnquantizedFusedMoEMethod):
        raise OffloadError(
            "quantization",
            quantization,
            f"the experts of {prefix} are quantised ({kind.__name__}), and only 16-bit and 32-bit "
            "experts can be offloaded",
            "Use an unquantised checkpoint, drop --quantization, or drop --plugin moe-offload",
        )
    method.__class__ = type(kind.__name__, (OffloadMixin, kind), {})
    method.offload_engine = engine
    method.offload_prefix = prefix
    method.offload_tiles = tiles


class OffloadMixin(FusedMoEMethodBase):
    """Keeps a layer's experts in the host pool and runs them through the engine."""

    offload_engine: OffloadEngine
    offload_prefix: str
    offload_layer: int
    offload_tiles: Callable[[int], TileConfig] | None

    requires_device_loading = False
    """The weights are never moved to the device as a whole, not even for conversion."""

    supports_pre_processed_weights = False
    """Weights that another process has put on the device are not in the host pool."""

    @property
    def is_monolithic(self) -> bool:
        """False: routing stays outside, so that the engine sees the routed ids."""
        return False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Create the layer's parameters as views of rows of the host pool."""
        with torch.device("cpu"):
            super().create_weights(layer, *args, **kwargs)
        parameters = dict(layer.named_parameters(recurse=False))
        spec = LayerSpec(
            name=self.offload_prefix,
            num_experts=layer.local_num_experts,
            layout=ExpertLayout.pack(
                (n, tuple(p.shape[1:]), p.dtype) for n, p in parameters.items()
            ),
            activation=_activation(layer, self.offload_prefix),
            weight_on_input=layer.apply_router_weight_on_input,
            tiles=self.offload_tiles,
            routing=_routing(layer),
        )
        self.offload_layer, segment = self.offload_engine.add_layer(spec)
        views = segment.views()
        for name, parameter in parameters.items():
            parameter.data = views[name]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every expert has arrived. The rows are in kernel format as they are."""
        views = self.offload_engine.pool.segments[self.offload_layer].views()
        if missing := [_checkpoint_name(layer, gap) for gap in fill.gaps(views)]:
            raise OffloadError(
                "checkpoint",
                self.offload_prefix,
                f"{len(missing)} expert tensors are missing, the first is {missing[0]}",
                "Download the checkpoint again or repair it",
            )
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the routed experts. Shared experts are the runner's business."""
        ids_TK = _local_ids(topk_ids, layer.expert_map)
        return self.offload_engine.run(self.offload_layer, x, topk_weights, ids_TK, topk_ids)


def _activation(layer: Any, prefix: str) -> activation.Activation:
    moe = layer.moe_config
    name = layer.activation.value
    if name not in activation.SUPPORTED:
        raise OffloadError(
            "activation",
            name,
            f"the experts of {prefix} use an activation that cannot be offloaded",
            f"Models with {', '.join(sorted(activation.SUPPORTED))} work",
        )

    def constant(field: str) -> Any:
        value = getattr(layer, field, None)
        return getattr(moe, field, None) if value is None else value

    alpha, beta = constant("swiglu_alpha"), constant("swiglu_beta")
    return activation.Activation(
        name=name,
        limit=constant("swiglu_limit"),
        alpha=1.0 if alpha is None else alpha,
        beta=0.0 if beta is None else beta,
        situ_beta=constant("activation_situ_beta"),
        situ_linear_beta=constant("activation_situ_linear_beta"),
    )


def _routing(layer: Any) -> Routing:
    local = [(layer._map_global_expert_id_to_local_expert_id(expert), expert)
             for expert in range(layer.global_num_experts)]  # fmt: skip
    return Routing(
        num_experts=layer.global_num_experts,
        top_k=layer.moe_config.experts_per_token,
        id_of_E=tuple(expert for position, expert in sorted(local) if position >= 0),
    )


def _local_ids(ids_TK: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Local ids of the experts that this worker holds, -1 for the others and for padding."""
    if expert_map is None:
        return ids_TK
    local_TK = expert_map[ids_TK.clamp(min=0).long()]
    return local_TK.masked_fill(ids_TK < 0, -1)


def _checkpoint_name(layer: Any, gap: fill.Gap) -> str:
    """Name a gap as checkpoints do that store experts one by one."""
    experts = _routing(layer).id_of_E
    stem, _, kind = gap.tensor.partition("_")
    if stem == "w2":
        part = layer.ckpt_down_proj_name
    elif gap.half == 0 or layer.ckpt_up_proj_name is None:
        part = layer.ckpt_gate_proj_name
    else:
        part = layer.ckpt_up_proj_name
    return f"{layer.layer_name}.{experts[gap.expert]}.{part}.{kind}"
