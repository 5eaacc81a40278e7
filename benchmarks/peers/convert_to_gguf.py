"""Runs llama.cpp's ``convert_hf_to_gguf.py`` on a checkpoint with a tokenizer of its own.

The script refuses tokenizers that it does not know by a hash of what they make of a sample text,
since llama.cpp would cut texts into words otherwise than they do. Here prompts are token ids and
answers are compared by token ids, so any known way to cut will do.
"""

import importlib
import sys
from typing import Any


def name_pre_tokenizer(_model: Any, _tokenizer: Any) -> str:
    """What the script asks for."""
    return "gpt-2"


def accept_any_tokenizer() -> None:
    """Put it into the class of text models, which newer clones have in a module of its own."""
    for module in ("conversion.base", "convert_hf_to_gguf"):
        try:
            text_model = getattr(importlib.import_module(module), "TextModel", None)
        except ModuleNotFoundError:
            continue
        if hasattr(text_model, "get_vocab_base_pre"):
            text_model.get_vocab_base_pre = name_pre_tokenizer
            return
    raise SystemExit("This llama.cpp has no TextModel.get_vocab_base_pre: take another version.")


def main() -> None:
    """Convert: the clone is the first argument, the others are the script's."""
    sys.path.insert(0, sys.argv.pop(1))
    accept_any_tokenizer()
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
