"""What the comparison of quantised formats makes of its runs."""

import pytest
from quantised_correctness import BACKENDS, ROUNDING, SHARES, judge

from vllm_moe_offload.quantised_checkpoints import FORMATS


def run(*steps):
    return {"answers": {"batch 1": [list(steps)]}, "schedule": {"batch 1": [[1]]}, "facts": {}}


def judged(stock, mine=None, **changed):
    mine = mine or run((5, -1.0), (6, -1.0))
    runs = {f"share {share}": mine for share in SHARES}
    runs |= {"one layer": mine, "stock": stock, "float32": mine, "decoded": mine, "exact": mine}
    return judge("fp8", runs | changed)


def test_every_format_is_compared():
    assert set(BACKENDS) == set(FORMATS)


def test_the_same_everywhere():
    row = judged(run((5, -1.0), (6, -1.0)))
    assert row["passed"]
    assert row["tokens_equal_stock"]
    assert row["requests_equal_stock"] == "1 of 1"


def test_tokens_may_part_where_both_are_as_likely():
    row = judged(run((5, -1.0), (7, -1.0 - ROUNDING / 2), (9, -8.0)))
    assert row["passed"]
    assert not row["tokens_equal_stock"]
    assert row["requests_equal_stock"] == "0 of 1"


def test_tokens_may_not_part_elsewhere():
    stock = run((5, -1.0), (7, -1.0 - 2 * ROUNDING))
    assert not judged(stock, exact=stock)["passed"]


def test_log_probabilities_must_be_near_before():
    stock = run((5, -1.0 - 2 * ROUNDING), (6, -1.0))
    assert not judged(stock, exact=stock)["passed"]


@pytest.mark.parametrize(("mine", "passes"), [(0.2, True), (0.21, True), (0.23, False)])
def test_further_apart_the_plugin_must_be_as_near_to_exact(mine, passes):
    row = judged(run((5, -1.2)), run((5, -1.0 + mine)), exact=run((5, -1.0)))
    assert row["max_difference_to_stock"] > ROUNDING
    assert row["passed"] == passes


def test_residency_must_change_nothing():
    row = judged(run((5, -1.0), (6, -1.0)), **{"share 0.25": run((5, -1.0000001), (6, -1.0))})
    assert not row["passed"]
    assert not row["bit_identical"]


def test_float32_must_have_the_tokens_of_decoded_weights():
    assert not judged(run((5, -1.0), (6, -1.0)), decoded=run((5, -1.0), (7, -1.0)))["passed"]


def test_stock_vllm_that_does_not_start_is_no_pass():
    row = judged({"error": "ValueError: no kernel"})
    assert not row["passed"]
    assert row["stock_error"] == "ValueError: no kernel"
