"""Chat in the terminal with a model that ``vllm serve`` offers.

    vllm serve MODEL --plugin moe-offload --moe-offload-cache-fraction 0.25
    python chat.py http://localhost:8000

The server speaks OpenAI's API, so any client of that will do; this one is OpenAI's own, which
vLLM depends on. An empty line or the end of the input ends it.
"""  # fmt: skip

import argparse
from collections.abc import Iterator

from openai import OpenAI


def main() -> None:
    """Answer line after line, each with all that was said before."""
    args = parse()
    client = OpenAI(base_url=f"{args.url.rstrip('/')}/v1", api_key="unused")
    model = client.models.list().data[0].id
    print(f"This is {model}.")
    messages: list[dict[str, str]] = []
    for question in questions():
        messages.append({"role": "user", "content": question})
        pieces = []
        for piece in answer(client, model, messages, args.max_tokens):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def questions() -> Iterator[str]:
    """Ask the user until there is nothing more to say."""
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        yield question


def answer(
    client: OpenAI, model: str, messages: list[dict[str, str]], max_tokens: int
) -> Iterator[str]:
    """Stream the model's answer piece by piece."""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        stream=True,
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            yield event.choices[0].delta.content


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server, such as http://localhost:8000")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer; default: 256")
    return parser.parse_args()


if __name__ == "__main__":
    main()
