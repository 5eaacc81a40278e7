"""The one error that users see: what is wrong, and what to change."""


class OffloadError(ValueError):
    """An option, a model or a machine that does not fit, and the remedy.

    Args:
        subject: the option or fact at fault, as the user knows it.
        value: its value.
        problem: what is wrong with it.
        remedy: what to change.
    """

    def __init__(self, subject: str, value: object, problem: str, remedy: str) -> None:
        self.subject = subject
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"moe-offload: {subject} = {value}: {problem}. {remedy}.")

    def __reduce__(self) -> tuple[type["OffloadError"], tuple[str, object, str, str]]:
        """Keep all four parts when the error crosses a process boundary."""
        return type(self), (self.subject, self.value, self.problem, self.remedy)
