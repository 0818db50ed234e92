"""Which tokenizer a task has."""

import os
from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .backbones_vmd import MASK_TOKEN
from .data.antibodies import antibody_tokenizer
from .data.characters import character_tokenizer
from .data.receptors import receptor_tokenizer
from .data.sudoku import sudoku_tokenizer
from .data.synthetic import synthetic_tokenizer
from .data.text import bpe_tokenizer
from .hub import check_model, load_tokenizer


def task_tokenizer(
    task: Literal["synthetic", "sudoku", "receptors", "antibodies"], model: str | os.PathLike | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a task with symbols of its own: for a model that is given (a folder or an id on the Hub) the
    one beside it.

    Raises:
        ValueError: the model has no tokenizer or another vocabulary.
    """
    own = {
        "synthetic": synthetic_tokenizer,
        "sudoku": sudoku_tokenizer,
        "receptors": receptor_tokenizer,
        "antibodies": antibody_tokenizer,
    }[task]()
    if model is None:
        return own
    tokenizer = load_tokenizer(model)
    if tokenizer.get_vocab() != own.get_vocab():
        vocabulary = " ".join(own.get_vocab())
        raise ValueError(f"the model of the task {task} must have its vocabulary, {vocabulary}, got {model}")
    return tokenizer


def text_tokenizer(
    model: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    tokenizer_size: int | None = None,
    texts: Iterable[str] = (),
) -> PreTrainedTokenizerBase:
    """The tokenizer of a text model: that of a given one, or for a new one what is asked for, with a mask and a pad
    token, which it is given where it has none.

    Args:
        model: a folder or an id on the Hub.
        tokenizer: the same, or "characters" (`character_tokenizer`, to whose 27 characters the text is reduced).
        tokenizer_size: train one of so many tokens on `texts` (`bpe_tokenizer`).

    Raises:
        ValueError: a model without a tokenizer, or with another than the one asked for; or nothing of all that.
    """
    if tokenizer is not None and tokenizer_size is not None:
        raise ValueError(f"tokenizer must be None with tokenizer_size = {tokenizer_size}, got {tokenizer!r}")
    if model is not None:
        check_model(model)
        own = load_tokenizer(model)
        if tokenizer_size is not None:
            raise ValueError(
                f"tokenizer_size must be None with a given model, which has its own, got {tokenizer_size}"
            )
        if tokenizer is not None and text_tokenizer(None, tokenizer).get_vocab() != own.get_vocab():
            raise ValueError(f"tokenizer must be that of the given model, {model}, got {tokenizer!r}")
        if own.mask_token is None:  # a causal language model's, see `VMDForMaskedDiffusion.from_causal_lm`
            own.add_special_tokens({"mask_token": MASK_TOKEN})
        return own
    if tokenizer_size is not None:
        return bpe_tokenizer(texts, tokenizer_size)
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be given for a new text model: --tokenizer_size N to train one on the text, --tokenizer "
            "with a folder or Hub id, or --tokenizer characters for text that is reduced to 27 characters"
        )
    if tokenizer == "characters":
        return character_tokenizer()
    loaded = load_tokenizer(tokenizer)
    special = {"mask_token": MASK_TOKEN, "pad_token": "[PAD]"}
    loaded.add_special_tokens({name: token for name, token in special.items() if getattr(loaded, name) is None})
    return loaded


__all__ = ["task_tokenizer", "text_tokenizer"]
