"""What the plugin refuses before anything is loaded, each with the option to change.

Reads: the finished ``VllmConfig``.
Versions: 0.32, 0.33.
"""

from pathlib import Path
from typing import Any

import vllm
from vllm.logger import init_logger

from vllm_moe_offload import patches
from vllm_moe_offload.checkpoint_check import (
    groups_out_of_order,
    is_group_index,
    missing_expert_tensors,
    tensor_names,
)
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches.version import check_version
from vllm_moe_offload.recorder import prepare_directory

logger = init_logger("vllm.moe_offload")

_DROP = "Drop it, or drop --plugin moe-offload"


def check_environment() -> None:
    """Refuse a vLLM that the patches do not fit."""
    check_version(vllm.__version__)
    patches.require_all()


def check_model(vllm_config: Any, config: MoeOffloadConfig) -> bool:
    """Whether the model has experts to offload.

    Raises:
        OffloadError: it has none and the user did not allow that, or ``layers`` names a layer
            that it does not have.
    """
    model = vllm_config.model_config
    if not model.is_moe:
        if config.allow_dense:
            logger.info("moe-offload: %s has no experts and is served untouched.", model.model)
            return False
        raise OffloadError(
            "model",
            model.model,
            "it is a dense model without routed experts, so there is nothing to offload",
            "Drop --plugin moe-offload, or add --moe-offload-allow-dense to serve it untouched",
        )
    last, total = config.last_layer(), model.get_total_num_hidden_layers()
    if last is not None and last >= total:
        raise OffloadError(
            "layers",
            config.layers,
            f"the model's decoder layers are 0 to {total - 1}",
            "Give layer numbers of this model, or all",
        )
    return True


def check_features(vllm_config: Any) -> None:
    """Refuse features of vLLM that move or wrap expert weights by themselves.

    Raises:
        OffloadError: for the first such feature that is on.
    """
    for option, value, active, reason in _conflicts(vllm_config):
        if active:
            raise OffloadError(
                option, value, f"it does not work with offloaded experts: {reason}", _DROP
            )


def _conflicts(vllm_config: Any) -> list[tuple[str, object, bool, str]]:
    parallel = vllm_config.parallel_config
    dispatched = "with --enable-expert-parallel tokens are dispatched inside the expert kernels"
    uva, prefetch = vllm_config.offload_config.uva, vllm_config.offload_config.prefetch
    return [
        (
            "--enable-eplb",
            True,
            parallel.enable_eplb,
            "it moves expert weights between GPUs by itself",
        ),
        (
            "--data-parallel-size",
            parallel.data_parallel_size,
            parallel.data_parallel_size > 1 and parallel.enable_expert_parallel,
            dispatched,
        ),
        (
            "--prefill-context-parallel-size",
            parallel.prefill_context_parallel_size,
            parallel.prefill_context_parallel_size > 1 and parallel.enable_expert_parallel,
            dispatched,
        ),
        (
            "--enable-dbo" if parallel.enable_dbo else "--ubatch-size",
            parallel.enable_dbo or parallel.ubatch_size,
            parallel.use_ubatching,
            "two batches would share one layer's slots",
        ),
        (
            "--enable-lora",
            True,
            vllm_config.lora_config is not None,
            "adapters on experts need all expert weights on the GPU",
        ),
        (
            "--weight-transfer-config",
            vllm_config.weight_transfer_config,
            vllm_config.weight_transfer_config is not None,
            "weights cannot be replaced once they are in the host pool",
        ),
        (
            "--cpu-offload-gb",
            uva.cpu_offload_gb,
            uva.cpu_offload_gb > 0 and _names_experts(uva.cpu_offload_params),
            "it would offload the experts a second time; --cpu-offload-params can keep it to "
            "other weights",
        ),
        (
            "--offload-group-size",
            prefetch.offload_group_size,
            prefetch.offload_group_size > 0 and _names_experts(prefetch.offload_params),
            "it would offload the experts a second time; --offload-params can keep it to other "
            "weights",
        ),
        (
            "--load-format",
            vllm_config.load_config.load_format,
            vllm_config.load_config.load_format in _SHARDED,
            "it holds experts as stock vLLM keeps them; auto loads the original checkpoint",
        ),
    ]


_SHARDED = ("sharded_state", "runai_streamer_sharded")
"""Formats of ``save_sharded_state``: the parameters of a worker as they were in its memory."""


_AROUND_EXPERTS = {
    "model", "layers", "mlp", "moe", "feed_forward", "block_sparse_moe", "mixer", "experts",
    "routed_experts",
}  # fmt: skip
"""Parts of the names under which models keep their routed experts."""


def _names_experts(segments: set[str]) -> bool:
    """Whether vLLM's own offloading may select expert weights; no selection means all."""
    words = {word for segment in segments for word in segment.split(".")}
    return not segments or any(
        word in _AROUND_EXPERTS or word.startswith(("w13_", "w2_")) for word in words
    )


def check_recording(vllm_config: Any, config: MoeOffloadConfig) -> None:
    """Refuse a directory that cannot be written to, and features whose rows are not one's own.

    Raises:
        OffloadError: for the directory, or the first such feature that is on.
    """
    if config.trace_path is None:
        return
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    conflicts = [
        (
            "--data-parallel-size",
            parallel.data_parallel_size,
            parallel.data_parallel_size > 1,
            "a layer then sees the tokens of other replicas too",
        ),
        (
            "--prefill-context-parallel-size",
            parallel.prefill_context_parallel_size,
            parallel.prefill_context_parallel_size > 1,
            "a worker then sees a part of each sequence",
        ),
        (
            "--kv-sharing-fast-prefill",
            True,
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "later layers then see fewer tokens than earlier ones",
        ),
        (
            "enable_adaptive_verification",
            True,
            getattr(speculative, "enable_adaptive_verification", False),
            "the host then does not know how many drafts each sequence runs",
        ),
    ]
    for option, value, active, reason in conflicts:
        if active:
            raise OffloadError(
                option, value, f"it does not work with trace_path: {reason}",
                "Drop it, or drop --moe-offload-trace-path",
            )  # fmt: skip
    prepare_directory(Path(config.trace_path))


def check_checkpoint(vllm_config: Any) -> None:
    """Refuse a checkpoint on disk that is cut off, lacks a file or expert tensor, or has act-order.

    Raises:
        OffloadError: with the name of the file or tensor.
    """
    folder = Path(vllm_config.model_config.model)
    if vllm_config.load_config.load_format == "dummy" or not folder.is_dir():
        return
    names = tensor_names(folder)
    # Layers of their own have experts of their own number, of which vLLM tells the largest.
    is_uniform = not getattr(vllm_config.model_config.hf_text_config, "block_configs", None)
    num_experts = vllm_config.model_config.get_num_experts()
    if is_uniform and (missing := missing_expert_tensors(names, num_experts)):
        raise OffloadError(
            "checkpoint",
            folder,
            f"{len(missing)} expert tensors are missing, the first is {missing[0]}",
            "Download the checkpoint again or repair it",
        )
    # The headers of a large checkpoint are not read again for nothing.
    if any(map(is_group_index, names)) and (name := groups_out_of_order(folder)):
        raise OffloadError(
            "checkpoint",
            name,
            "its groups are in the order of activations (act-order), which is not supported",
            "Use a checkpoint that was quantised with desc_act = false",
        )
