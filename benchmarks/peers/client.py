"""Sends the same prompts to any server and notes when the first and the last token came."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx  # vLLM's server depends on it

_TIMEOUT_S = 900.0
_TICK_S = 0.002
_LAG_LIMIT = 0.15


class PeerError(RuntimeError):
    """A system failed; the text says how."""


@dataclass(frozen=True)
class Prompt:
    """A text and the same as token ids, for servers that take only one of them."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Piece:
    """What one event of a stream adds.

    Args:
        text: the new text.
        token_ids: the new tokens, None if the server does not tell.
        total: tokens of the whole answer, if this event says so.
    """

    text: str = ""
    token_ids: list[int] | None = None
    total: int | None = None


class Dialect(Protocol):
    """How a server wants to be asked."""

    path: str

    def body(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        """What is sent: greedy, streamed, past the end of the text."""

    def read(self, event: dict[str, Any]) -> Piece:
        """What an event holds."""


@dataclass(frozen=True)
class OpenAI:
    """``/v1/completions``.

    Args:
        model: name of the model.
        takes_ids: whether a prompt may be token ids.
        returns_ids: whether vLLM's ``return_token_ids`` is understood.
    """

    model: str
    takes_ids: bool = True
    returns_ids: bool = False
    path = "/v1/completions"

    def body(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        """What is sent: greedy, streamed, past the end of the text."""
        more = {"return_token_ids": True} if self.returns_ids else {}
        return {
            "model": self.model,
            "prompt": prompt.token_ids if self.takes_ids else prompt.text,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }

    def read(self, event: dict[str, Any]) -> Piece:
        """What an event holds."""
        total = (event.get("usage") or {}).get("completion_tokens")
        if not event.get("choices"):
            return Piece(total=total)
        (choice,) = event["choices"]
        return Piece(choice.get("text") or "", choice.get("token_ids"), total)


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's own ``/completion``, which tells the token ids."""

    path = "/completion"

    def body(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        """What is sent: greedy, streamed, past the end of the text."""
        return {
            "prompt": prompt.token_ids,
            "n_predict": max_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,
        }

    def read(self, event: dict[str, Any]) -> Piece:
        """What an event holds."""
        if event.get("stop"):
            return Piece(total=event.get("tokens_predicted"))
        return Piece(event.get("content") or "", event.get("tokens") or None)


@dataclass(frozen=True)
class Reply:
    """One answer, and when it came, in seconds of one clock."""

    text: str
    token_ids: list[int] | None
    num_tokens: int
    tokens_in_first: int
    sent_s: float
    first_s: float
    last_s: float

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.first_s - self.sent_s


@dataclass(frozen=True)
class Round:
    """The answers to prompts that were sent together.

    Args:
        replies: one a prompt.
        lag_s: the longest time in which this client, ready to read, did not run: what came
            meanwhile seems to have come late, and all at once.
    """

    replies: Sequence[Reply]
    lag_s: float

    @property
    def first_token_s(self) -> float:
        """Mean time to the first token."""
        return sum(r.first_token_s for r in self.replies) / len(self.replies)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second, without the wait for the first token.

        All tokens but those that came first of each request, over the time from the first token
        of any to the last of all. So a server that takes fewer sequences at once than were sent
        has the later prompts counted against it. None where one event brought everything.
        """
        span = max(r.last_s for r in self.replies) - min(r.first_s for r in self.replies)
        tokens = sum(r.num_tokens - r.tokens_in_first for r in self.replies)
        return tokens / span if span > 0 and tokens > 0 else None

    @property
    def is_punctual(self) -> bool:
        """Whether the client's lag is small beside what it timed."""
        span = max(r.last_s for r in self.replies) - min(r.sent_s for r in self.replies)
        return self.lag_s <= _LAG_LIMIT * span


def ask(url: str, dialect: Dialect, prompts: Sequence[Prompt], max_tokens: int) -> Round:
    """Send all prompts at once and wait for all answers.

    Raises:
        PeerError: the server refused, hung up, or answered nothing.
    """
    try:
        return asyncio.run(_ask_all(url, dialect, prompts, max_tokens))
    except httpx.HTTPError as error:
        raise PeerError(f"did not answer: {error!r}") from error


async def _ask_all(url: str, dialect: Dialect, prompts: Sequence[Prompt], max_tokens: int) -> Round:
    limits = httpx.Limits(max_connections=None)
    lags = [0.0]
    async with httpx.AsyncClient(
        base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        watch = asyncio.create_task(_watch_lag(lags))
        try:
            asked = (_ask(client, dialect, prompt, max_tokens) for prompt in prompts)
            replies = await asyncio.gather(*asked)
        finally:
            watch.cancel()
    return Round(replies, max(lags))


async def _watch_lag(lags: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        lags.append(time.perf_counter() - start - _TICK_S)


async def _ask(
    client: httpx.AsyncClient, dialect: Dialect, prompt: Prompt, max_tokens: int
) -> Reply:
    pieces: list[Piece] = []
    times: list[float] = []
    sent = time.perf_counter()
    body = dialect.body(prompt, max_tokens)
    async with client.stream("POST", dialect.path, json=body) as response:
        if not response.is_success:
            text = (await response.aread()).decode(errors="replace")
            raise PeerError(f"answered {response.status_code}: {text[:500]}")
        async for line in response.aiter_lines():
            now = time.perf_counter()
            if (piece := _piece(dialect, line)) is not None:
                pieces.append(piece)
                times.append(now)
    return _reply(sent, times, pieces)


def _piece(dialect: Dialect, line: str) -> Piece | None:
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise PeerError(f"answered {event['error']}")
    return dialect.read(event)


def _reply(sent: float, times: Sequence[float], pieces: Sequence[Piece]) -> Reply:
    spoken = [(t, p) for t, p in zip(times, pieces, strict=True) if p.text or p.token_ids]
    if not spoken:
        raise PeerError("answered without a token")
    ids: list[int] | None = None
    if all(piece.token_ids for _, piece in spoken):
        ids = [token for _, piece in spoken for token in piece.token_ids or []]
    totals = [piece.total for piece in pieces if piece.total is not None]
    count = len(ids) if ids else max(totals, default=len(spoken))
    return Reply(
        text="".join(piece.text for _, piece in spoken),
        token_ids=ids,
        num_tokens=count,
        tokens_in_first=len(spoken[0][1].token_ids or [0]),
        sent_s=sent,
        first_s=spoken[0][0],
        last_s=spoken[-1][0],
    )
