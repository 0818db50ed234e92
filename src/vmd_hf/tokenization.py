"""Which tokenizer a task has, and whether a tokenizer is that of a model."""

import os
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .configuration_vmd import VMDConfig
from .data.sudoku import sudoku_tokenizer
from .data.synthetic import synthetic_tokenizer
from .data.text import character_tokenizer
from .hub import load_tokenizer


def task_tokenizer(
    task: Literal["synthetic", "text", "sudoku"], model: str | os.PathLike | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a task: for a model that is given (a folder or an id on the Hub) the one beside it.

    Raises:
        ValueError: the model has no tokenizer, or, of a task with symbols of its own, another vocabulary.
    """
    if task == "text" and model is not None:
        return load_tokenizer(model)
    own = {"synthetic": synthetic_tokenizer, "sudoku": sudoku_tokenizer, "text": character_tokenizer}[task]()
    if model is None:
        return own
    tokenizer = load_tokenizer(model)
    if tokenizer.get_vocab() != own.get_vocab():
        vocabulary = " ".join(own.get_vocab())
        raise ValueError(f"the model of the task {task} must have its vocabulary, {vocabulary}, got {model}")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: VMDConfig) -> None:
    """Raises:
    ValueError: the tokenizer has an id that the model has not, or another mask token.
    """
    if len(tokenizer) > config.vocab_size or tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            "tokenizer must be that of the model, whose vocab_size and mask_token_id are "
            f"{config.vocab_size} and {config.mask_token_id}, got one of {len(tokenizer)} tokens with the mask token "
            f"{tokenizer.mask_token_id}"
        )


__all__ = ["check_tokenizer", "task_tokenizer"]
