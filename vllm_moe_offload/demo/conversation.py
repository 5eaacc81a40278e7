"""What the demo asks, and what it is answered."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import httpx  # vLLM's server depends on it

TOKENS_PER_ANSWER = 32

_ANSWER_TIMEOUT_S = 600.0


class DemoError(RuntimeError):
    """The demo cannot go on; the text is for the user."""


@dataclass(frozen=True)
class Request:
    """One request to the OpenAI API: greedy, of fixed length, answered with its token ids.

    ``with_logprobs`` asks for the log-probability of each of these tokens as well.
    """

    text: str
    is_chat: bool
    with_logprobs: bool = False

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        message = {"messages": [{"role": "user", "content": self.text}]}
        return {
            **(message if self.is_chat else {"prompt": self.text}),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **(self._logprobs() if self.with_logprobs else {}),
        }

    def _logprobs(self) -> dict[str, Any]:
        """Ask for those of the chosen tokens alone."""
        return {"logprobs": True, "top_logprobs": 0} if self.is_chat else {"logprobs": 0}


_PROMPTS = (
    "A mixture of experts replaces",
    "The router scores the experts and",
    "Copies are slow, therefore",
    "def add(a, b):\n    return",
)
_QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Why do most experts not fit into one accelerator?",
    "Count from 1 to 9.",
)
REQUESTS = (
    *(Request(text, is_chat=False) for text in _PROMPTS),
    *(Request(text, is_chat=True) for text in _QUESTIONS),
)


@dataclass(frozen=True)
class Answer:
    """What a server generated for a request."""

    request: Request
    text: str
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, request: Request, reply: Mapping[str, Any]) -> Self:
        """Read a reply of either kind.

        Raises:
            DemoError: the reply has no token ids, so there is nothing to compare.
        """
        choice = reply["choices"][0]
        if not choice.get("token_ids"):
            raise DemoError(f"The server returned no token ids for {request.text!r}.")
        text = choice["message"].get("content") if request.is_chat else choice["text"]
        logprobs = _logprobs_of(request, choice) if request.with_logprobs else []
        return cls(request, text or "", choice["token_ids"], logprobs)


def _logprobs_of(request: Request, choice: Mapping[str, Any]) -> list[float]:
    if request.is_chat:
        return [token["logprob"] for token in choice["logprobs"]["content"]]
    return list(choice["logprobs"]["token_logprobs"])


@dataclass(frozen=True)
class Outcome:
    """One server's answers to all requests at once, the time, and what the plugin counted."""

    answers: list[Answer]
    seconds: float
    stats: dict[str, int]

    @property
    def ms_per_token(self) -> float:
        """Wall time over the tokens of all answers."""
        return 1e3 * self.seconds / sum(len(a.token_ids) for a in self.answers)


async def ask(url: str, requests: Sequence[Request], with_stats: bool) -> Outcome:
    """Send all requests at once, chats as completions if the model cannot chat."""
    # The first requests pay for what is set up late; they are not part of the figures. A server
    # closes the connection of a request that it fails at, so the others get new ones.
    async with _client(url) as client:
        await _answer(client, Request("Hello", is_chat=False), max_tokens=4)
        if not await _can_chat(client):
            requests = [replace(request, is_chat=False) for request in requests]
    async with _client(url) as client:
        before = await _stats(client) if with_stats else {}
        start = time.monotonic()
        answers = await asyncio.gather(*(_answer(client, r, TOKENS_PER_ANSWER) for r in requests))
        seconds = time.monotonic() - start
        after = await _stats(client) if with_stats else {}
    return Outcome(answers, seconds, _since(before, after))


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=_ANSWER_TIMEOUT_S, trust_env=False)


async def _answer(client: httpx.AsyncClient, request: Request, max_tokens: int) -> Answer:
    response = await client.post(request.path, json=request.body(max_tokens))
    response.raise_for_status()
    return Answer.parse(request, response.json())


async def _can_chat(client: httpx.AsyncClient) -> bool:
    try:
        await _answer(client, Request("Hello", is_chat=True), max_tokens=4)
    except httpx.HTTPStatusError:
        # No chat template, or one with tokens that a small vocabulary lacks, or, as for gpt-oss,
        # one that has to be downloaded. A completion has been answered before.
        return False
    return True


async def _stats(client: httpx.AsyncClient) -> dict[str, int]:
    response = await client.post("/collective_rpc", json={"method": "moe_offload_stats"})
    response.raise_for_status()
    (of_worker,) = response.json()["results"]
    if of_worker is None:
        raise DemoError("The server offloaded nothing.")
    return of_worker


def _since(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    counts = ("active", "hits", "misses", "streamed", "bytes_moved")
    return {n: value - before[n] if n in counts else value for n, value in after.items()}
