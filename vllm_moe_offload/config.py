"""The plugin's options, one frozen object for the three ways to give them."""

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_moe_offload.errors import OffloadError

KEY = "moe_offload"
"""Where the options travel inside vLLM's ``additional_config``."""

Auto = Literal["auto"]
PositiveGiB = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]
PositiveMiB = Annotated[float, Field(gt=0, le=100_000_000, allow_inf_nan=False)]
NoOrPositiveMiB = Annotated[float, Field(ge=0, le=100_000_000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=86_400 * 365, allow_inf_nan=False)]
Interval = Annotated[float, Field(ge=0.1, le=86_400 * 365, allow_inf_nan=False)]

_REMEDIES = {
    "gpu_gb": "Give a positive number of GiB, or auto; cache_fraction=0 keeps no expert at all",
    "cache_fraction": "Give a number from 0 (no expert in slots) to 1 (all of them)",
    "kv_floor": "Give a share of the KV cache from 0 to 1, such as 0.1",
    "kv_policy": "Give auto or fixed",
    "staging_mb": "Give a positive number of MiB, or auto",
    "policy": "Give adaptive or lru",
    "predictor": "Give none, gate, markov or eam",
    "prefetch_mb": "Give a number of MiB, 0 to only count what a predictor finds, or auto",
    "layers": "Give all, or decoder layer numbers such as 0-11,20",
    "stats_interval_s": "Give a number of seconds, 0 to write no statistics",
    "trace_path": "Give a directory that vLLM may write to, or leave it out to record nothing",
    "trace_file_mb": "Give a positive number of MiB",
    "trace_interval_s": "Give a number of seconds, 0.1 or more",
    "allow_dense": "Give true or false",
}


class MoeOffloadConfig(BaseModel):
    """How much of the experts stays in GPU memory, and which layers are offloaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_gb: PositiveGiB | Auto = Field(
        default="auto",
        description="GPU memory for expert slots in GiB; auto borrows what the KV cache leaves, or "
        "holds up to a quarter of the experts where it cannot be shared.",
    )
    cache_fraction: Share | None = Field(
        default=None,
        description="Share of each layer's experts that has a slot, 0 to 1, instead of gpu_gb.",
    )
    kv_floor: Share = Field(
        default=0.1,
        description="Share of the KV cache that experts never borrow, beside the room for one "
        "sequence of the greatest length, 0 to 1.",
    )
    kv_policy: Literal["auto", "fixed"] = Field(
        default="auto",
        description="Whether experts give borrowed memory back when requests need it (auto), or "
        "get all but the floor once and for all (fixed).",
    )
    staging_mb: PositiveMiB | Auto = Field(
        default="auto",
        description="GPU memory in MiB through which experts without a slot pass; auto sizes "
        "it by the model.",
    )
    policy: Literal["adaptive", "lru"] = Field(
        default="adaptive",
        description="Which experts leave their slots first: the least recently used (lru), or "
        "what learns from every step and falls back to lru (adaptive).",
    )
    predictor: Literal["none", "gate", "markov", "eam"] = Field(
        default="none",
        description="What guesses the experts of the next layer, to fetch them while this one is "
        "computed: its router (gate), transition counts (markov), similar sequences (eam).",
    )
    prefetch_mb: NoOrPositiveMiB | Auto = Field(
        default="auto",
        description="MiB that a layer may fetch ahead; auto measures what computation hides, and "
        "switches prefetch off where it does not pay.",
    )
    layers: str = Field(
        default="all",
        pattern=r"^\s*(all|\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*)\s*$",
        description="Decoder layers whose experts are offloaded: all, or numbers such as 0-11,20.",
    )
    stats_interval_s: Seconds = Field(
        default=60.0,
        description="Seconds between two log lines of statistics; 0 writes none.",
    )
    trace_path: str | None = Field(
        default=None,
        description="Directory to record the routed experts in, and to start warm from.",
    )
    trace_file_mb: PositiveMiB = Field(
        default=64.0,
        description="Size in MiB at which a recorded file is complete and the next one begins.",
    )
    trace_interval_s: Interval = Field(
        default=60.0,
        description="Seconds between two writes of what was recorded; a crash loses that much.",
    )
    allow_dense: bool = Field(
        default=False,
        description="Serve a model without experts untouched instead of refusing it.",
    )

    @field_validator(
        "gpu_gb", "cache_fraction", "kv_floor", "staging_mb", "prefetch_mb", "stats_interval_s",
        "trace_file_mb", "trace_interval_s", mode="before",
    )  # fmt: skip
    @classmethod
    def _no_flag(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a flag is no number")
        return value

    @field_validator("trace_path")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("it is empty")
        # The workers may run in another directory.
        return value and os.path.abspath(os.path.expanduser(value))

    @model_validator(mode="after")
    def _trace_options_need_a_path(self) -> Self:
        for name in ("trace_file_mb", "trace_interval_s"):
            value = getattr(self, name)
            if self.trace_path is None and value != type(self).model_fields[name].default:
                raise OffloadError(
                    name,
                    value,
                    "nothing is recorded without trace_path",
                    "Give trace_path as well, or drop this option",
                )
        return self

    @model_validator(mode="after")
    def _one_size_only(self) -> Self:
        if self.cache_fraction is not None and self.gpu_gb != "auto":
            raise OffloadError(
                "cache_fraction",
                self.cache_fraction,
                f"gpu_gb = {self.gpu_gb} already sets the size of the slots",
                "Give one of the two",
            )
        return self

    @model_validator(mode="after")
    def _sharing_needs_auto(self) -> Self:
        size = "gpu_gb" if self.cache_fraction is None else "cache_fraction"
        for name in ("kv_floor", "kv_policy"):
            value = getattr(self, name)
            if not self.wants_to_borrow and value != type(self).model_fields[name].default:
                raise OffloadError(
                    name,
                    value,
                    f"with {size} = {getattr(self, size)} the slots have memory of their own, and "
                    "the KV cache is not shared",
                    f"Drop {size}, or drop this option",
                )
        return self

    @model_validator(mode="after")
    def _prefetch_needs_a_predictor(self) -> Self:
        if self.predictor == "none" and self.prefetch_mb != "auto":
            raise OffloadError(
                "prefetch_mb",
                self.prefetch_mb,
                "nothing is fetched ahead without a predictor",
                "Give predictor as well, or drop this option",
            )
        return self

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for first, last in [] if self.layers.strip() == "all" else self._ranges():
            if first > last:
                raise OffloadError(
                    "layers",
                    self.layers,
                    f"the range {first}-{last} holds no layer",
                    _REMEDIES["layers"],
                )
        return self

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Build the configuration from a user's options.

        Raises:
            OffloadError: an unknown name, or a value that is out of range.
        """
        if not isinstance(options, Mapping):
            raise OffloadError(
                KEY, options, "it is not a mapping of options", 'Give {"gpu_gb": 8}, or {}'
            )
        for name in options:
            _check_name(str(name), cls.model_fields)
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, OffloadError):
                raise cause from None
            name = str(first["loc"][0])
            raise OffloadError(
                name, options[name], _problem(error, name), _REMEDIES[name]
            ) from None

    @property
    def wants_to_borrow(self) -> bool:
        """Whether the slots' memory is to be borrowed from the KV cache, where that can be had."""
        return self.gpu_gb == "auto" and self.cache_fraction is None

    def includes(self, layer: int) -> bool:
        """Whether the experts of this decoder layer are offloaded."""
        return self.layers.strip() == "all" or any(
            first <= layer <= last for first, last in self._ranges()
        )

    def last_layer(self) -> int | None:
        """Highest decoder layer that ``layers`` names, None for all."""
        if self.layers.strip() == "all":
            return None
        return max(last for _, last in self._ranges())

    def _ranges(self) -> list[tuple[int, int]]:
        bounds = [part.strip().split("-") for part in self.layers.split(",")]
        return [(int(b[0]), int(b[-1])) for b in bounds]


def _check_name(name: str, known: Mapping[str, Any]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    remedy = f"Did you mean {near[0]}?" if near else f"The options are {', '.join(known)}"
    raise OffloadError("option", name, "there is no such option", remedy.rstrip("?"))


def _problem(error: ValidationError, name: str) -> str:
    # Of a union's complaints only the first, about the number, tells the user something.
    first = next(e for e in error.errors() if e["loc"][0] == name)
    if first["type"] == "string_pattern_mismatch":
        return "it is not written as this option is"
    text = first["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]
