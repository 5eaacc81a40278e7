"""What the predictors' tables take on the GPU, for those who plan without torch."""

from vllm_moe_offload.predictors.figures import CAPACITY


def table_bytes(predictor: str, num_layers: int, num_experts: int) -> int:
    """Bytes of the tables that grow with the model; the others take some kilobytes.

    Args:
        predictor: its name, as the option has it.
        num_layers: offloaded layers.
        num_experts: experts of each.
    """
    experts = num_layers * num_experts
    if predictor == "markov":
        pairs = max(0, num_layers - 1) * num_experts**2
        # Evidence and counts of every pair; prior, bias, uses and recent ones of each expert.
        return pairs * (2 + 4) + experts * 4 * 4
    if predictor == "eam":
        return experts * CAPACITY * 2
    return 0
