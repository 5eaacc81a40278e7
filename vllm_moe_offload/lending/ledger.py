"""Which block ids the scheduler withholds from vLLM, and on whose behalf."""

from collections.abc import Iterable

from vllm_moe_offload.lending.boundary import Boundary


class Ledger:
    """Withheld ids: lent ones from the boundary on, and held ones right below it.

    The boundary moves down only over a whole increment's blocks. Blocks of the wished increments
    that are free are held at once, so that nobody new moves in; those in use are waited for.
    Held blocks serve neither tenant, so they are the first to be given back.

    Args:
        boundary: the arithmetic.
    """

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary
        self.lent = 0
        """Increments that belong to experts."""
        self.wished = 0
        """Increments that experts are to get, never fewer than ``lent``."""
        self.held: set[int] = set()

    @property
    def num_withheld(self) -> int:
        """Blocks that are not vLLM's now."""
        return len(self.boundary.blocks(0, self.lent)) + len(self.held)

    def wish(self, increments: int) -> list[int]:
        """Aim at so many increments, at least those that are lent.

        Returns:
            Held ids that are not wished for any more, ascending, to be given back.
        """
        assert increments <= self.boundary.max_increments
        before, self.wished = self.wished, max(self.lent, increments)
        if self.wished >= before:
            return []
        first = self.boundary.first_block(self.wished)
        return self._release(id_ for id_ in self.held if id_ < first)

    def missing(self) -> list[int]:
        """Ids of the wished increments that are still vLLM's, from the boundary downwards."""
        wanted = self.boundary.blocks(self.lent, self.wished)
        return [id_ for id_ in reversed(wanted) if id_ not in self.held]

    def hold(self, ids: Iterable[int]) -> None:
        """Note ids that were taken out of vLLM's pool."""
        ids = set(ids)
        wanted = self.boundary.blocks(self.lent, self.wished)
        assert not ids & self.held, "a block is taken twice"
        assert all(id_ in wanted for id_ in ids), "a block was taken that nobody wished for"
        self.held |= ids

    def advance(self) -> int:
        """Move the boundary down over every increment that is complete.

        Returns:
            By how many increments.
        """
        before = self.lent
        while self.lent < self.wished:
            run = self.boundary.blocks(self.lent, self.lent + 1)
            if not all(id_ in self.held for id_ in run):
                break
            self.held.difference_update(run)
            self.lent += 1
        return self.lent - before

    def recall(self, increments: int) -> list[int]:
        """Move the boundary up to so many increments, and hold nothing below it.

        Returns:
            Ids that are vLLM's again, ascending.
        """
        assert 0 <= increments <= self.lent
        back = self._release(self.held)
        back += self.boundary.blocks(increments, self.lent)
        self.lent = self.wished = increments
        return back

    def _release(self, ids: Iterable[int]) -> list[int]:
        back = sorted(ids)
        self.held.difference_update(back)
        return back

    def check_integrity(self) -> None:
        """Raise unless the withheld ids are those that the two counts allow."""
        assert 0 <= self.lent <= self.wished <= self.boundary.max_increments
        wanted = self.boundary.blocks(self.lent, self.wished)
        assert all(id_ in wanted for id_ in self.held), "a held block is not wished for"
        assert self.boundary.first_block(self.wished) >= self.boundary.floor_blocks or (
            self.wished == 0
        )
