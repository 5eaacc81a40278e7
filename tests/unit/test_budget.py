import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.budget import (
    AUTO_STAGING_BYTES,
    Budget,
    LayerDemand,
    check_budget,
    plan_budget,
)
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.memory import HostMemory
from vllm_moe_offload.sizes import GIB, MIB, format_size

PAGE = 4096

demands = st.lists(
    st.builds(
        LayerDemand,
        name=st.just("model.layers.0.mlp.experts"),
        num_experts=st.integers(1, 512),
        row_bytes=st.integers(1, 1 << 14).map(lambda pages: pages * PAGE),
    ),
    min_size=1,
    max_size=4,
)


def layers(*shapes: tuple[int, int]) -> list[LayerDemand]:
    return [LayerDemand(f"layer {i}", *shape) for i, shape in enumerate(shapes)]


def config(**options) -> MoeOffloadConfig:
    return MoeOffloadConfig.parse(options)


@given(demands, st.floats(1e-6, 1000))
def test_size_is_used_up_and_never_exceeded(layers, gpu_gb):
    budget = plan_budget(layers, config(gpu_gb=gpu_gb))
    given_bytes = Fraction(gpu_gb) * GIB
    assert budget.slot_bytes <= given_bytes
    assert budget.slot_bytes == sum(
        count * layer.row_bytes for count, layer in zip(budget.slots, layers, strict=True)
    )
    most = max(budget.slots)
    for count, layer in zip(budget.slots, layers, strict=True):
        assert count == min(most, layer.num_experts)
    if any(count < layer.num_experts for count, layer in zip(budget.slots, layers, strict=True)):
        one_more_each = (most + 1) * sum(layer.row_bytes for layer in layers)
        assert one_more_each > given_bytes - 1


@given(demands)
def test_pool_holds_every_expert(layers):
    budget = plan_budget(layers, config())
    assert budget.pool_bytes == sum(layer.num_experts * layer.row_bytes for layer in layers)


@given(st.integers(1, 1024).flatmap(lambda e: st.tuples(st.just(e), st.integers(0, e))))
def test_fraction_names_any_number_of_slots(sizes):
    num_experts, slots = sizes
    budget = plan_budget(layers((num_experts, PAGE)), config(cache_fraction=slots / num_experts))
    assert budget.slots == (slots,)


@pytest.mark.parametrize(
    ("share", "experts", "slots"), [(0.29, 100, 29), (0.5, 5, 2), (0.999, 8, 7), (0, 8, 0)]
)
def test_fraction(share, experts, slots):
    assert plan_budget(layers((experts, PAGE)), config(cache_fraction=share)).slots == (slots,)


def test_automatic_size_is_a_quarter():
    budget = plan_budget(layers((128, PAGE), (8, 3 * PAGE), (3, PAGE)), config())
    assert budget.slots == (32, 2, 0)


@pytest.mark.parametrize(("increments", "slots"), [(0, 0), (20, 20), (31, 31), (32, 32), (99, 32)])
def test_automatic_size_is_less_where_the_device_has_less(increments, slots):
    pair = layers((128, PAGE), (128, 3 * PAGE))
    free = 2 * (increments * 4 * PAGE + PAGE)
    assert plan_budget(pair, config(), device_free=free).slots == (slots, slots)
    # Whoever says how many they are to be is refused if they do not fit.
    assert plan_budget(pair, config(cache_fraction=0.5), device_free=free).slots == (64, 64)
    assert plan_budget(pair, config(), borrows=True, device_free=free).slots == (0, 0)


@pytest.mark.parametrize(("taken", "slots"), [(0, 10), (3, 7), (10, 0), (11, 0)])
def test_a_draft_model_gets_what_its_target_has_left(taken, slots):
    options = config(gpu_gb=10 * PAGE / GIB)
    one = layers((128, PAGE))
    assert plan_budget(one, options, taken_bytes=taken * PAGE).slots == (slots,)
    assert plan_budget(one, config(cache_fraction=0.5), taken_bytes=taken * PAGE).slots == (64,)


@given(demands, st.sampled_from([0, 0.25, 0.5, 1]), st.integers(0, 40))
def test_staging_holds_two_rows(layers, share, extra_rows):
    automatic = plan_budget(layers, config(cache_fraction=share))
    streaming = [
        layer.row_bytes
        for layer, count in zip(layers, automatic.slots, strict=True)
        if count < layer.num_experts
    ]
    if not streaming:
        assert (automatic.staging_bytes, automatic.largest_staged_row) == (0, 0)
        return
    largest = max(streaming)
    assert automatic.largest_staged_row == largest
    assert 2 * largest <= automatic.staging_bytes <= max(AUTO_STAGING_BYTES, 2 * largest)
    size = largest * (2 + extra_rows)
    given_size = plan_budget(layers, config(cache_fraction=share, staging_mb=size / MIB))
    assert given_size.staging_bytes == size
    assert given_size.device_bytes == given_size.slot_bytes + size


def test_automatic_staging_has_no_more_rows_than_experts():
    assert plan_budget(layers((4, PAGE)), config()).staging_bytes == 4 * PAGE
    assert plan_budget(layers((1, PAGE)), config(cache_fraction=0)).staging_bytes == 2 * PAGE


def test_no_staging_if_all_experts_have_slots():
    budget = plan_budget(layers((8, PAGE)), config(cache_fraction=1, staging_mb=1e-6))
    assert budget.staging_bytes == 0
    assert budget.device_bytes == budget.slot_bytes == 8 * PAGE


@given(demands, st.floats(1e-9, 1, exclude_max=True))
def test_staging_too_small(layers, share):
    largest = max(layer.row_bytes for layer in layers)
    staging_mb = share * 2 * largest / MIB
    with pytest.raises(OffloadError) as error:
        plan_budget(layers, config(cache_fraction=0, staging_mb=staging_mb))
    message = str(error.value)
    assert f"staging_mb = {staging_mb}: " in message
    assert f"two experts of {format_size(largest)} each" in message
    enough = re.search(r"Give at least (\d+), or auto", message)[1]
    plan_budget(layers, config(cache_fraction=0, staging_mb=enough))


BUDGET = Budget(
    slots=(4,), pool_bytes=32 * GIB, slot_bytes=8 * GIB, staging_bytes=2 * GIB,
    largest_staged_row=GIB,
)  # fmt: skip


def check(available: int, free: int, *, on_host: bool = False, **options) -> None:
    check_budget(
        BUDGET,
        config(**options),
        host=HostMemory(available, "the container's limit of 99 bytes"),
        device_free=free,
        device_name="NVIDIA H200",
        device_is_host=on_host,
    )


def test_what_just_fits():
    check(32 * GIB, 10 * GIB)
    check(42 * GIB, 42 * GIB, on_host=True)


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"gpu_gb": 8}, "gpu_gb = 8.0: "),
        ({}, "gpu_gb = auto: "),
        ({"cache_fraction": 0.25}, "cache_fraction = 0.25: "),
    ],
)
def test_device_too_small(options, subject):
    with pytest.raises(OffloadError) as error:
        check(32 * GIB, 10 * GIB - 1, **options)
    message = str(error.value)
    assert subject in message
    assert "slots (8 GiB) and staging (2 GiB) need 10 GiB" in message
    assert "NVIDIA H200 has 10 GiB free" in message
    assert "Lower gpu_gb, cache_fraction or staging_mb" in message


@pytest.mark.parametrize(("on_host", "needed"), [(False, "32 GiB"), (True, "42 GiB")])
def test_host_too_small(on_host, needed):
    with pytest.raises(OffloadError) as error:
        check(31 * GIB, 40 * GIB, on_host=on_host)
    message = str(error.value)
    assert "host pool = 32 GiB: " in message
    assert f"need {needed} of host memory" in message
    assert "the container's limit of 99 bytes leaves 31 GiB" in message
    assert "raise the container's limit" in message
