"""Sizes of what a weight loader brings against those of the parameter it goes into."""

import pytest
import torch

from vllm_moe_offload.checked_loader import Room, checked_loader
from vllm_moe_offload.errors import OffloadError

EXPERTS = 4


def load(param, loaded, *, shard="w1", expert=3, room, loader=lambda *_: "loaded"):
    def name_of(name, shard, expert):
        return f"{name} of {shard} of {expert}"

    wrapped = checked_loader(loader, name_of, room)
    return wrapped(param, loaded, weight_name="w13_weight", shard_id=shard, expert_id=expert)


CODES = torch.zeros(EXPERTS, 8, 6, dtype=torch.int32)
SCALES = torch.zeros(EXPERTS, 8, 6)


@pytest.mark.parametrize(
    ("param", "loaded", "room"),
    [
        (SCALES, torch.zeros(4, 6), Room(2, 1)),
        (SCALES, torch.zeros(8, 6), Room(1, 1)),
        (SCALES, torch.zeros(4, 6, dtype=torch.float16), Room(2, 1)),
        # Of two workers one has half of a tensor, or all of it.
        (SCALES, torch.zeros(8, 6), Room(2, 2)),
        (SCALES, torch.zeros(4, 6), Room(2, 2)),
        # As many codes in smaller words, which a loader takes apart.
        (CODES, torch.zeros(4, 24, dtype=torch.uint8), Room(2, 1)),
        (torch.zeros(EXPERTS, 2), torch.zeros(()), Room(2, 1)),
        (torch.zeros(EXPERTS), torch.zeros(1), Room(1, 1)),
        # All experts at once.
        (SCALES, torch.zeros(EXPERTS, 4, 6), Room(2, 1)),
        (SCALES, torch.zeros(1, 1), None),
    ],
)
def test_what_fits(param, loaded, room):
    assert load(param, loaded, room=room) == "loaded"


@pytest.mark.parametrize(
    ("param", "loaded", "room", "wanted"),
    [
        (SCALES, torch.zeros(4, 5), Room(2, 1), "24 values"),
        (SCALES, torch.zeros(8, 6), Room(2, 1), "24 values"),
        (SCALES, torch.zeros(2, 6), Room(2, 2), "48 values"),
        (CODES, torch.zeros(4, 6, dtype=torch.uint8), Room(2, 1), "96 bytes"),
        (torch.zeros(EXPERTS), torch.zeros(2), Room(1, 1), "1 values"),
    ],
)
def test_what_does_not_fit(param, loaded, room, wanted):
    with pytest.raises(OffloadError) as error:
        load(param, loaded, room=room, loader=lambda *_: pytest.fail("it was loaded"))
    message = str(error.value)
    assert "w13_weight of w1 of 3" in message
    assert str(tuple(loaded.shape)) in message
    assert wanted in message


@pytest.mark.parametrize(("rows", "workers", "fits"), [(8, 1, True), (7, 1, False), (7, 2, True)])
def test_stacked_experts(rows, workers, fits):
    """They come cut, and the last of several workers may get less."""
    loaded = torch.zeros(EXPERTS, rows, 6)
    if fits:
        assert load(SCALES, loaded, shard=None, expert=None, room=Room(2, workers)) == "loaded"
        return
    with pytest.raises(OffloadError, match="192 values"):
        load(SCALES, loaded, shard=None, expert=None, room=Room(2, workers))


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, IndexError, AssertionError])
def test_what_vllm_refuses_is_named(kind):
    def refuse(*_):
        raise kind("sizes differ")

    with pytest.raises(OffloadError, match=r"w13_weight of w1 of 3.*sizes differ") as error:
        load(SCALES, torch.zeros(4, 6), room=None, loader=refuse)
    assert isinstance(error.value.__cause__, kind)


def test_other_errors_are_left_alone():
    with pytest.raises(AttributeError):
        load(SCALES, torch.zeros(4, 6), room=None, loader=lambda *_: SCALES.no_such_thing)


def test_marks_of_a_loader_are_kept():
    """By them vLLM tells which arguments a loader takes."""

    def loader(*_):
        return None

    loader.supports_moe_loading = True
    assert checked_loader(loader, lambda *_: "", None).supports_moe_loading
