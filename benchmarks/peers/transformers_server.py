"""``/v1/completions`` around transformers' ``generate``: requests that wait together are a batch.

Only what the benchmark asks for: token ids in, greedy, streamed, token ids and text out.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web  # vLLM depends on it

GATHER_S = 0.02
"""Seconds after a request in which others may join its batch."""


class Streamer:
    """Passes each step's tokens on to the requests that wait for them, from another thread.

    Args:
        queues: one for each sequence of the batch.
        loop: where they are read.
    """

    def __init__(self, queues: list[asyncio.Queue], loop: asyncio.AbstractEventLoop) -> None:
        self._queues, self._loop = queues, loop
        self._is_prompt = True

    def put(self, token_ids: Any) -> None:
        """Take the prompts at first, and then the tokens of a step."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for queue, token in zip(self._queues, token_ids.tolist(), strict=True):
            self._loop.call_soon_threadsafe(queue.put_nowait, token)

    def end(self) -> None:
        """Nothing: each request knows its length."""


class Model:
    """A model and the requests that wait for it.

    Args:
        path: the checkpoint.
        dtype: of weights and computation.
        gpu_bytes: what weights may take of the GPU, None without one.
    """

    def __init__(self, path: Path, dtype: str, gpu_bytes: int | None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        on_gpu = {"device_map": "auto", "max_memory": {0: gpu_bytes, "cpu": 1 << 50}}
        place = {"device_map": "cpu"} if gpu_bytes is None else on_gpu
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **place).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._waiting: asyncio.Queue = asyncio.Queue()

    def ask(self, prompt: list[int], max_tokens: int) -> asyncio.Queue:
        """Queue a request; its tokens come out of what is returned, or an exception."""
        answer: asyncio.Queue = asyncio.Queue()
        self._waiting.put_nowait((prompt, max_tokens, answer))
        return answer

    async def serve(self) -> None:
        """Work batch after batch."""
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(GATHER_S)
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            queues = [answer for _, _, answer in batch]
            streamer = Streamer(queues, asyncio.get_running_loop())
            try:
                await asyncio.to_thread(self._generate, batch, streamer)
            except Exception as error:  # whatever it is, those who wait are told
                for queue in queues:
                    queue.put_nowait(error)

    def _generate(self, batch: list[tuple], streamer: Streamer) -> None:
        import torch

        longest = max(len(prompt) for prompt, _, _ in batch)
        padding = [longest - len(prompt) for prompt, _, _ in batch]
        pairs = list(zip(padding, (prompt for prompt, _, _ in batch), strict=True))
        ids = torch.tensor([[0] * missing + prompt for missing, prompt in pairs])
        mask = torch.tensor([[0] * missing + [1] * len(prompt) for missing, prompt in pairs])
        device = self._model.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded itself: hooks take it to the GPU
            device = torch.device("cuda")
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                max_new_tokens=max(count for _, count, _ in batch), eos_token_id=-1,
                pad_token_id=0, streamer=streamer,
            )  # fmt: skip


async def completions(request: web.Request) -> web.StreamResponse:
    """Answer a request with an event a token."""
    model: Model = request.app["model"]
    asked = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    answer = model.ask(asked["prompt"], asked["max_tokens"])
    for _ in range(asked["max_tokens"]):
        token = await answer.get()
        if isinstance(token, Exception):
            await response.write(_event({"error": repr(token)}))
            break
        choice = {"text": model.tokenizer.decode([token]), "token_ids": [token]}
        await response.write(_event({"choices": [choice]}))
    await response.write(b"data: [DONE]\n\n")
    return response


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


async def health(_request: web.Request) -> web.Response:
    """The port is opened once the model is loaded."""
    return web.Response()


async def start(app: web.Application) -> None:
    """Begin to work."""
    app["work"] = asyncio.create_task(app["model"].serve())


def main() -> None:
    """Load and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--gpu-bytes", type=int)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    app = web.Application()
    app["model"] = Model(args.checkpoint, args.dtype, args.gpu_bytes)
    app.add_routes([web.get("/health", health), web.post("/v1/completions", completions)])
    app.on_startup.append(start)
    web.run_app(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
