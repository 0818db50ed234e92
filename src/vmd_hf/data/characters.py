"""Text, one token a character: cleaning and tokenizer."""

import string
import sys

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ALPHABET = " abcdefghijklmnopqrstuvwxyz"

_DIGIT_NAMES = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")
_TO_ALPHABET = bytes(ord(chr(code).lower() if chr(code) in string.ascii_letters else " ") for code in range(256))


def clean_text8(text: str) -> str:
    """Clean text in the manner of text8 (Mahoney's `wikifil.pl`), without its removal of wiki markup.

    Digits are spelled out one by one ("1790" becomes "one seven nine zero"), ASCII letters become lower case, and
    each run of any other characters becomes one space. Letters with accents are such other characters. Unlike in
    text8, spaces at both ends are stripped.

    Returns:
        Text over the 27 characters of `ALPHABET`.
    """
    cleaned = text.encode("ascii", errors="replace")  # one "?" for each other character
    for digit, digit_name in enumerate(_DIGIT_NAMES):
        cleaned = cleaned.replace(str(digit).encode(), b" " + digit_name + b" ")
    return b" ".join(cleaned.translate(_TO_ALPHABET).split()).decode()


def character_tokenizer(alphabet: str = ALPHABET, eos_token: str | None = "[EOS]") -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token a character; decoding gives the text back exactly.

    The ids follow the order of `alphabet`, then come "[MASK]", "[PAD]" and `eos_token`. No special tokens are added
    to a text. There is no unknown token: a character outside the alphabet is an error of the tokenizers library, and
    one that names the character in `encode_characters`. After `save_pretrained`, `AutoTokenizer` loads it.

    Args:
        alphabet: the characters, each once.
        eos_token: the token for the end of a text, or None for a vocabulary without one.

    Raises:
        ValueError: `alphabet` is empty, repeats a character or contains `eos_token`.
    """
    special_tokens = {"mask_token": "[MASK]", "pad_token": "[PAD]"}
    if eos_token is not None:
        special_tokens["eos_token"] = eos_token
    tokens = [*alphabet, *special_tokens.values()]
    if not alphabet or len(set(tokens)) < len(tokens):
        raise ValueError(
            "`alphabet` must have at least one character, each only once and none equal to `eos_token`, got "
            f"{alphabet!r} with `eos_token` {eos_token!r}"
        )
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **special_tokens
    )


def has_text8_alphabet(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its tokens, special ones aside, are the 27 characters to which `clean_text8` reduces a text."""
    return set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) == set(ALPHABET)


def is_character_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is one that `character_tokenizer` makes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return isinstance(getattr(backend, "model", None), models.WordLevel) and isinstance(backend.decoder, decoders.Fuse)


def encode_characters(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The ids that a `character_tokenizer` gives, by one table lookup for the whole text.

    A special token spelled out in the text is read as its characters, not as that token.

    Returns:
        int64 array of shape (number of characters,).

    Raises:
        ValueError: a character is not in the vocabulary, or `tokenizer` has a token of several characters.
    """
    table = np.full(sys.maxunicode + 1, -1, dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if token in tokenizer.all_special_tokens:
            continue
        if len(token) != 1:
            raise ValueError(f"`tokenizer` must have one character a token (`character_tokenizer`), got {token!r}")
        table[ord(token)] = index
    ids = table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]  # (number of characters,)
    if len(ids) and ids.min() < 0:
        position = int((ids < 0).argmax())
        raise ValueError(
            f"`text` must consist of characters in the vocabulary of `tokenizer`, got {text[position]!r} at position "
            f"{position}"
        )
    return ids


__all__ = [
    "ALPHABET",
    "character_tokenizer",
    "clean_text8",
    "encode_characters",
    "has_text8_alphabet",
    "is_character_tokenizer",
]
