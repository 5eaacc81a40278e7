"""vLLM's fused-MoE layer made offload-aware: its quantisation method with another storage.

The method object that vLLM chose keeps its class name, because vLLM's weight loaders look at
it; a mixin in front of it puts the weights into the host pool and hands the routed tokens to the
engine.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_moe_offload import fill
from vllm_moe_offload.checked_loader import Room, checked_loader
from vllm_moe_offload.checkpoint_check import file_of
from vllm_moe_offload.damage import (
    Damage,
    damaged_input_scales,
    damaged_scales,
    damaged_weights,
)
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels import activation
from vllm_moe_offload.kernels.expert_mlp import TileConfig
from vllm_moe_offload.kernels.gpu import has_e4m3
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.schemes import Scheme, refusal, scheme_of

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


def is_quantised(method: Any) -> bool:
    """Whether a layer's experts are stored in a quantised format."""
    return not isinstance(method, UnquantizedFusedMoEMethod)


def is_offloaded(method: Any) -> bool:
    """Whether a layer's experts run through an engine."""
    return isinstance(method, OffloadMixin)


def offload(
    method: Any,
    engine: OffloadEngine,
    prefix: str,
    tiles: Callable[[int], TileConfig] | None = None,
) -> None:
    """Turn the method of a layer with 16-bit or 32-bit experts into an offload-aware one.

    Args:
        method: what vLLM chose for the layer; changed in place.
        engine: the engine that the layer joins.
        prefix: the layer's name in the model.
        tiles: tuned tiles of the grouped product by number of tokens.
    """
    _mix(method, OffloadMixin, engine, prefix)
    method.offload_tiles = tiles


def offload_quantised(method: Any, engine: OffloadEngine, prefix: str) -> None:
    """Turn the method of a layer with quantised experts into an offload-aware one, in place.

    Raises:
        OffloadError: the experts are quantised in a way that cannot be offloaded.
    """
    scheme = scheme_of(method, prefix, rounds_inputs=has_e4m3(engine.device))
    _mix(method, QuantisedOffloadMixin, engine, prefix)
    method.offload_scheme = scheme


def _mix(method: Any, mixin: type, engine: OffloadEngine, prefix: str) -> None:
    kind = type(method)
    method.__class__ = type(kind.__name__, (mixin, kind), {})
    method.offload_engine = engine
    method.offload_prefix = prefix


class OffloadMixin(FusedMoEMethodBase):
    """Keeps a layer's experts in the host pool and runs them through the engine."""

    offload_engine: OffloadEngine
    offload_prefix: str
    offload_layer: int
    offload_tiles: Callable[[int], TileConfig] | None
    offload_padding: Callable[[int], torch.Tensor | None] | None = None
    """Tells which of so many rows are padding, where the router does not leave them out itself."""

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
        layout = ExpertLayout.pack((n, tuple(p.shape[1:]), p.dtype) for n, p in parameters.items())
        self._join(layer, LayerSpec(tiles=self.offload_tiles, **self._about(layer, layout)))

    def _about(self, layer: Any, layout: ExpertLayout) -> dict[str, Any]:
        return {
            "name": self.offload_prefix,
            "num_experts": layer.local_num_experts,
            "layout": layout,
            "activation": _activation(layer, self.offload_prefix),
            "weight_on_input": layer.apply_router_weight_on_input,
            "routing": _routing(layer),
        }

    def _join(self, layer: Any, spec: LayerSpec) -> None:
        self.offload_layer, segment = self.offload_engine.add_layer(spec)
        parameters = dict(layer.named_parameters(recurse=False))
        for name, view in segment.filled_views().items():
            if name in parameters:
                parameters[name].data = view

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what has arrived, and put it in the kernels' order."""
        # Made-up weights leave codes as they are, and nobody reads anything into the answers.
        is_loaded = get_current_vllm_config().load_config.load_format != "dummy"
        if is_loaded:
            self._check_filled(layer)
        self._put_in_order(layer)
        if is_loaded:
            self._check_values(layer)
        self.moe_quant_config = self._quant_config(layer)

    def _put_in_order(self, layer: Any) -> None:
        """The rows are in kernel format as they are."""

    def _quant_config(self, layer: Any) -> Any:
        return self.get_fused_moe_quant_config(layer)

    def _gaps(self, _layer: Any) -> list[fill.Gap]:
        segment = self.offload_engine.pool.segments[self.offload_layer]
        transposed = self.offload_engine.specs[self.offload_layer].transposed
        return fill.gaps(segment.filled_views(), transposed)

    def _check_filled(self, layer: Any) -> None:
        gaps = self._gaps(layer)
        if missing := [_checkpoint_name(layer, g.tensor, g.expert, g.half) for g in gaps]:
            raise OffloadError(
                "checkpoint",
                self.offload_prefix,
                f"{len(missing)} expert tensors are missing, the first is {missing[0]}",
                "Download the checkpoint again or repair it",
            )

    def _check_values(self, layer: Any) -> None:
        segment = self.offload_engine.pool.segments[self.offload_layer]
        self._refuse(layer, "weights", damaged_weights(segment.views()), {})

    def _refuse(
        self, layer: Any, what: str, damages: list[Damage], places: Mapping[str, str]
    ) -> None:
        """Refuse damages, if there are any; ``places`` names tensors as the loader fills them."""
        if not damages:
            return
        first = damages[0]
        place = places.get(first.tensor, first.tensor)
        name = _checkpoint_name(layer, place, first.expert, first.half)
        file = file_of(Path(get_current_vllm_config().model_config.model), name)
        raise OffloadError(
            "checkpoint",
            self.offload_prefix,
            f"{len(damages)} {what} of experts are damaged, the first is {name}"
            f"{f' in {file}' if file else ''}: it holds {first.problem}",
            "Download the checkpoint again or repair it",
        )

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
        is_padding_T = self.offload_padding(len(topk_ids)) if self.offload_padding else None
        return self.offload_engine.run(
            self.offload_layer, x, topk_weights, ids_TK, topk_ids, is_padding_T
        )


class QuantisedOffloadMixin(OffloadMixin):
    """Keeps quantised experts as the checkpoint stores them, also in slots."""

    offload_scheme: Scheme

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Create the layer's parameters, those of an expert's row as views of the host pool."""
        try:
            with torch.device("cpu"):
                super(OffloadMixin, self).create_weights(layer, *args, **kwargs)
        except (ValueError, AssertionError, RuntimeError) as error:
            raise refusal(
                type(self).__name__, self.offload_prefix, f"vLLM refuses their sizes ({error})"
            ) from error
        parameters = dict(layer.named_parameters(recurse=False))
        layout, filled_as = self._layouts(parameters, kwargs)
        scheme = self.offload_scheme
        about = self._about(layer, layout)
        spec = LayerSpec(
            format=scheme.format, filled_as=filled_as, transposed=scheme.transposed, **about
        )
        self._join(layer, spec)
        self._check_while_loading(layer, parameters)

    def _check_while_loading(self, layer: Any, parameters: Mapping[str, Any]) -> None:
        """Have loaders refuse what does not fit, and find scales of activations that never come."""
        in_rows = set(self.offload_scheme.places.values())
        if getattr(self, "weight_scale_refine", None) is not None:
            # Where a worker's part of a block has scales of its own, the loader makes them.
            in_rows = {name for name in in_rows if "scale" not in name}
        for name, parameter in parameters.items():
            halves = 2 if name.startswith("w13") and self.moe.is_act_and_mul else 1
            room = Room(halves, layer.moe_config.moe_parallel_config.tp_size)
            parameter.weight_loader = checked_loader(
                parameter.weight_loader,
                partial(_name_while_loading, layer),
                room if name in in_rows else None,
            )
        fill.mark(self._input_scales(parameters))

    def _input_scales(self, parameters: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: parameters[name].data for name in self.offload_scheme.maxima.values()}

    def _layouts(
        self, parameters: dict[str, Any], sizes: dict[str, Any]
    ) -> tuple[ExpertLayout, ExpertLayout]:
        intermediate = sizes["intermediate_size_per_partition"]
        columns = intermediate * (2 if self.moe.is_act_and_mul else 1)
        hidden, group = sizes["hidden_size"], self.offload_scheme.format.scale_terms
        if self.offload_scheme.format.elements != "e4m3" and group:
            for name, size in (("hidden", hidden), ("intermediate", intermediate)):
                if size % group:
                    raise refusal(
                        f"groups of {group}",
                        self.offload_prefix,
                        f"a group does not divide the {name} size of {size}",
                    )
        bias = parameters["w13_bias"].dtype if self.moe.has_bias else None
        return self.offload_scheme.layouts(parameters, columns, hidden, intermediate, bias)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what has arrived, and put codes in order where the kernels want another one."""
        self._check_biases(layer)
        super().process_weights_after_loading(layer)

    def _put_in_order(self, layer: Any) -> None:
        segment = self.offload_engine.pool.segments[self.offload_layer]
        parameters = dict(layer.named_parameters(recurse=False))
        self.offload_scheme.put_in_order(segment.filled_views(), segment.views(), parameters)

    def _quant_config(self, layer: Any) -> Any:
        # What dispatches tokens between workers leaves them as they are.
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def _check_biases(self, layer: Any) -> None:
        loaded: set[str] = getattr(layer, "_loaded_expert_biases", set())
        if loaded and not self.moe.has_bias:
            raise refusal(
                sorted(loaded)[0], self.offload_prefix, "their biases are not part of the model"
            )

    def _gaps(self, layer: Any) -> list[fill.Gap]:
        parameters = dict(layer.named_parameters(recurse=False))
        # One number of the layer comes into the rows when all are loaded.
        in_rows = [g for g in super()._gaps(layer) if g.tensor not in self.offload_scheme.maxima]
        return in_rows + fill.gaps(self._input_scales(parameters))

    def _check_values(self, layer: Any) -> None:
        super()._check_values(layer)
        segment = self.offload_engine.pool.segments[self.offload_layer]
        parameters = dict(layer.named_parameters(recurse=False))
        damages = damaged_scales(self.offload_scheme.format, segment.views())
        damages += damaged_input_scales(self._input_scales(parameters))
        self._refuse(layer, "scales", damages, self.offload_scheme.places)


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


def _checkpoint_name(layer: Any, tensor: str, expert: int, half: int) -> str:
    """Name a part of a parameter as checkpoints do that store experts one by one."""
    return _stored_name(layer, tensor, _routing(layer).id_of_E[expert], half)


def _stored_name(layer: Any, tensor: str, expert_id: int, half: int) -> str:
    stem, _, kind = tensor.partition("_")
    if stem == "w2":
        part = layer.ckpt_down_proj_name
    elif half == 0 or layer.ckpt_up_proj_name is None:
        part = layer.ckpt_gate_proj_name
    else:
        part = layer.ckpt_up_proj_name
    return f"{layer.layer_name}.{expert_id}.{part}.{kind}"


def _name_while_loading(
    layer: Any, weight_name: str, shard: str | None, expert_id: int | None
) -> str:
    """The checkpoint's name of what a weight loader is given, the parameter's if it is stacked."""
    if expert_id is None:
        return weight_name
    tensor = weight_name.rpartition(".")[2]
    return _stored_name(layer, tensor, expert_id, half=int(shard == "w3"))
