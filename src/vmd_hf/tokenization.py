"""Which tokenizer a task has."""

import os
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .data.receptors import receptor_tokenizer
from .data.sudoku import sudoku_tokenizer
from .data.synthetic import synthetic_tokenizer
from .data.text import character_tokenizer
from .hub import check_model, load_tokenizer


def task_tokenizer(
    task: Literal["synthetic", "text", "sudoku", "receptors"], model: str | os.PathLike | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a task: for a model that is given (a folder or an id on the Hub) the one beside it.

    Raises:
        ValueError: the model has no tokenizer, or, of a task with symbols of its own, another vocabulary.
    """
    if model is not None:
        check_model(model)
    if task == "text" and model is not None:
        return load_tokenizer(model)
    own = {
        "synthetic": synthetic_tokenizer,
        "sudoku": sudoku_tokenizer,
        "text": character_tokenizer,
        "receptors": receptor_tokenizer,
    }[task]()
    if model is None:
        return own
    tokenizer = load_tokenizer(model)
    if tokenizer.get_vocab() != own.get_vocab():
        vocabulary = " ".join(own.get_vocab())
        raise ValueError(f"the model of the task {task} must have its vocabulary, {vocabulary}, got {model}")
    return tokenizer


__all__ = ["task_tokenizer"]
