"""How many experts a layer may be fetched ahead, decided by what steps take: pure, no device.

Steps are compared with each other, half of them with prefetch and half without, in turns so short
that nothing else changes in between. Only that tells whether prefetch pays: a guess that comes true
saves a transfer, one that does not takes the link and a slot.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

OFF = -1
"""Instead of a number of rows: predict nothing, so that the predictor costs nothing either."""

LEARNING_STEPS = 256
"""Steps before the first trial, in which predictors learn and slots fill."""

TURN = 16
"""Steps of a trial with one setting before the other has its turn."""

SKIPPED = 2
"""First steps of a turn that are not counted: what they find in the slots the other turn left."""

TRIMMED = 2
"""Slowest and quickest steps of a turn that are left out: a host that is held up for once would
decide the trial."""

PAIRS = 6
"""Turns of either setting in a trial."""

STEPS_OF_TRIAL = 2 * PAIRS * TURN

LEAST_PAIRS = 3
"""Pairs of turns that must be comparable: their steps had the same number of tokens."""

GAIN_TO_START = 0.01
GAIN_TO_STAY = -0.005
"""Share of the time of a step that prefetch must save to be switched on, and to be left on."""

STEPS_ON = 8192
STEPS_OFF = 2048
MOST_STEPS_OFF = 65536
"""Steps between trials; while prefetch stays off it is tried ever more seldom."""

HALF_A_ROW = 0.5
"""A layer that hides so much of a row may try one: no less than a row can be fetched."""


@dataclass(frozen=True)
class StepPlan:
    """What a step is to do: rows to fetch a layer, and whether its end is to be counted.

    ``trial`` and ``place`` tell which step of which trial it is, if of any.
    """

    rows: int
    counts: bool = False
    trial: int = 0
    place: int = -1


@dataclass(frozen=True)
class StepCost:
    """What a step has taken.

    ``moved`` is how many experts have been moved on demand since the start, where the plan asked
    for that.
    """

    plan: StepPlan
    tokens: int
    seconds: float
    moved: int | None = None


@dataclass
class _Turn:
    """The steps of one turn: how long each that counts took, and what was moved meanwhile."""

    rows: int = OFF
    tokens: int | None = None
    seconds: list[float] = field(default_factory=list)
    is_mixed: bool = False
    first_moved: int | None = None
    last_moved: int | None = None

    def add(self, cost: StepCost, place: int) -> None:
        if place == SKIPPED - 1:
            self.first_moved = cost.moved
        if place < SKIPPED:
            return
        self.is_mixed |= self.tokens not in (None, cost.tokens)
        self.tokens = cost.tokens
        self.seconds.append(cost.seconds)
        self.last_moved = cost.moved

    @property
    def is_whole(self) -> bool:
        return not self.is_mixed and len(self.seconds) == TURN - SKIPPED

    @property
    def step_seconds(self) -> float:
        """What a step of a whole turn takes."""
        usual = sorted(self.seconds)[TRIMMED:-TRIMMED]
        return sum(usual) / len(usual)

    @property
    def is_counted(self) -> bool:
        return self.is_whole and None not in (self.first_moved, self.last_moved)

    @property
    def moved(self) -> float:
        """Experts a step."""
        return ((self.last_moved or 0) - (self.first_moved or 0)) / len(self.seconds)


class PrefetchControl:
    """Decides on the rows of every step.

    Args:
        layers: layers that can be fetched for.
        row_seconds: time that the link takes for one expert.
        say: takes a line for the log.
    """

    def __init__(self, layers: int, row_seconds: float, say: Callable[[str], None]) -> None:
        self._layers = layers
        self._row_seconds = row_seconds
        self._say = say
        self._is_on = False
        self._was_told = False
        self._rows = 0
        self._pause = STEPS_OFF
        self._idle_steps = LEARNING_STEPS
        self._trial = 0
        self._planned = self._noted = STEPS_OF_TRIAL
        self._tried_rows = 0
        self._turns: list[_Turn] = []

    @property
    def rows(self) -> int:
        """Rows a layer outside of trials; until the first of them guesses are only counted."""
        if not self._was_told:
            return 0
        return self._rows if self._is_on else OFF

    def plan(self) -> StepPlan:
        """Say what the step that begins is to do."""
        if self._planned == STEPS_OF_TRIAL:
            if self._noted < STEPS_OF_TRIAL:
                return StepPlan(self.rows)  # The last costs are still to come.
            self._idle_steps -= 1
            if self._idle_steps >= 0:
                return StepPlan(self.rows)
            self._trial += 1
            self._planned = self._noted = 0
            self._turns = [_Turn() for _ in range(2 * PAIRS)]
        place, self._planned = self._planned, self._planned + 1
        turn, step = divmod(place, TURN)
        if turn % 2 == 0:
            counts = step in (SKIPPED - 1, TURN - 1)
            return StepPlan(OFF, counts, self._trial, place)
        if step == 0:
            self._tried_rows = self._turns[turn].rows = self._budget()
        return StepPlan(self._tried_rows, False, self._trial, place)

    def note(self, cost: StepCost) -> None:
        """Take in what a step has taken, in the order of the plans."""
        if cost.plan.trial != self._trial or cost.plan.place < 0:
            return
        turn, step = divmod(cost.plan.place, TURN)
        self._turns[turn].add(cost, step)
        self._noted = cost.plan.place + 1
        if self._noted == STEPS_OF_TRIAL:
            self._decide()

    def _budget(self) -> int:
        """Rows whose transfer the computation of a layer hides, by the last turn without any."""
        last = next((turn for turn in reversed(self._turns[::2]) if turn.is_counted), None)
        if last is None:
            return 0
        computed = max(0.0, last.step_seconds - last.moved * self._row_seconds)
        hidden = computed / self._layers / self._row_seconds
        return 1 if HALF_A_ROW <= hidden < 1 else int(hidden)

    def _decide(self) -> None:
        pairs = [
            (off, on)
            for off, on in zip(self._turns[::2], self._turns[1::2], strict=True)
            if off.is_whole and on.is_whole and off.tokens == on.tokens
        ]
        fetching = [(off, on) for off, on in pairs if on.rows > 0]
        if len(pairs) < LEAST_PAIRS:
            self._idle_steps = STEPS_OFF  # Nothing was learned: batches came and went.
            return
        gain = 0.0
        if len(fetching) >= LEAST_PAIRS:
            on_seconds = sum(on.step_seconds for _, on in fetching)
            gain = 1 - on_seconds / sum(off.step_seconds for off, _ in fetching)
            self._rows = min(on.rows for _, on in fetching)
        is_on = len(fetching) >= LEAST_PAIRS and gain > (
            GAIN_TO_STAY if self._is_on else GAIN_TO_START
        )
        self._tell(is_on, gain if fetching else None)
        if is_on:
            self._pause = STEPS_OFF
        self._idle_steps = STEPS_ON if is_on else self._pause
        if not is_on:
            self._pause = min(MOST_STEPS_OFF, 2 * self._pause)
        self._is_on = is_on

    def _tell(self, is_on: bool, gain: float | None) -> None:
        if self._was_told and is_on == self._is_on:
            return
        if is_on:
            self._say(f"prefetch is on: {self._rows} experts a layer make steps {gain:.1%} shorter")
        elif gain is None:
            self._say("prefetch is off: a layer's computation hides no transfer of an expert")
        else:
            self._say(f"prefetch is off: it would change the time of a step by {-gain:+.1%}")
        self._was_told = True
