"""Instruction data: prompts that are context, and answers that are learned, in the formats of TRL."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .text import token_dataset

logger = logging.get_logger(__name__)


def load_instructions(source: str | Path, config_name: str | None = None, num_held_out: int = 1000) -> DatasetDict:
    """Rows for `instruction_dataset`: "train" and "validation".

    Args:
        source: a JSON Lines, CSV or Parquet file, a folder of such files, or a dataset on the Hub.
        num_held_out: rows of train, at most a twentieth, that are the validation split of a source without one.

    Raises:
        ValueError: a source without a train split, or with fewer than two rows in it and no validation split.
    """
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(source).suffix)
    if kind is not None:
        splits = load_dataset(kind, data_files=str(source))
    else:
        splits = load_dataset(str(source), config_name)
    if "train" not in splits or ("validation" not in splits and len(splits["train"]) < 2):
        raise ValueError(f"source must have a train split of at least two rows, got {source} with {splits}")
    if "validation" in splits:
        return DatasetDict({name: splits[name] for name in ("train", "validation")})
    size = max(min(num_held_out, len(splits["train"]) // 20), 1)
    parts = splits["train"].train_test_split(size, seed=0)
    return DatasetDict({"train": parts["train"], "validation": parts["test"]})


def instruction_dataset(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Dataset:
    """Tokens of instructions and answers, with labels for the answers only.

    Args:
        rows: with `prompt` and `completion`, texts or lists of messages, or with `messages`, of which every one by the
            assistant is an answer. Messages are `{"role": ..., "content": ...}` and need a chat template.
        tokenizer: each answer ends with its end-of-sequence token, which is learned, so that `generate` stops there.
        sequence_length: longer rows are left out, and counted in the log: an answer without its end would be learned
            as one that goes on.

    Returns:
        `input_ids` and `labels` (-100 in prompts), int64, of each row's own length.

    Raises:
        ValueError: for rows of other columns, messages without a chat template, a template by which a prompt is not
            the beginning of the conversation, or no row that is left.
    """
    every = [encode_instruction(row, tokenizer) for row in rows]
    pairs = [pair for pair in every if len(pair[0]) <= sequence_length]
    if not pairs:
        raise ValueError(f"sequence_length must hold at least one of {len(every)} rows, got {sequence_length}")
    if left_out := len(every) - len(pairs):
        logger.warning(f"{left_out} of {len(every)} rows are left out: more than {sequence_length} tokens")
    input_ids, labels = zip(*pairs, strict=True)
    return token_dataset(list(input_ids), labels=list(labels))


def encode_instruction(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `labels` of one row, (tokens,) int64."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "messages" in row:
        messages = row["messages"]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt, answer = (
            tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for text in (row["prompt"], row["completion"])
        )
        return _with_labels([*prompt, *answer, *end], [(len(prompt), len(prompt) + len(answer) + len(end))])
    elif "prompt" in row and "completion" in row:
        messages = [*row["prompt"], *row["completion"]]
        answers = list(range(len(row["prompt"]), len(messages)))
    else:
        raise ValueError(f"rows must have prompt and completion, or messages, got {sorted(row)}")
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer must have a chat template for messages, got none: set tokenizer.chat_template")

    def ids_of(number: int, **settings: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages[:number], tokenize=True, return_dict=False, **settings)

    ids, learned = ids_of(len(messages)), []
    for index in answers:
        before, with_answer = ids_of(index, add_generation_prompt=True), ids_of(index + 1)
        if ids[: len(before)] != before or ids[: len(with_answer)] != with_answer:
            raise ValueError(
                f"the chat template must give a conversation that begins with its prompt, got another for {messages}"
            )
        learned.append((len(before), len(with_answer)))
    if learned and end and learned[-1][1] == len(ids) and ids[-1] != end[0]:
        ids, learned[-1] = [*ids, *end], (learned[-1][0], len(ids) + 1)
    return _with_labels(ids, learned)


def _with_labels(ids: list[int], learned: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.full_like(input_ids, -100)
    for start, stop in learned:
        labels[start:stop] = input_ids[start:stop]
    return input_ids, labels


__all__ = ["encode_instruction", "instruction_dataset", "load_instructions"]
