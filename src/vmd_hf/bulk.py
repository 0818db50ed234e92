"""Many prompts: from a file of JSON lines to one, resumable, over any number of processes and machines."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .evaluation.tables import write_json
from .hub import encode_text


def generate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str | os.PathLike,
    target: str | os.PathLike,
    batch_size: int = 32,
    seed: int = 0,
    **settings: Any,
) -> None:
    """Fills or continues the prompt of every line of `source`; `target` has the same lines in the same order, each
    with `text` and, of new tokens, `completion`.

    Prompts of similar length share a batch. Each row draws from a generator of its own, so that neither the batch nor
    the number of processes matters to it. Lines that are done are kept in the folder `<target>.parts` until all are:
    after a kill, the same call goes on, whatever the number of processes is now. Under `accelerate launch`, on one
    machine or on several that share these files, the processes divide the work.

    Args:
        source: JSON lines with a `prompt`, in which mask tokens are gaps; other names are passed on.
        target: must not exist.
        batch_size: prompts in a call of `generate`.
        seed: row i draws from a seed made of this and i.
        settings: of `generate`, such as `max_new_tokens` and `num_steps`.

    Raises:
        ValueError: for a line without a prompt or one that the tokenizer cannot read, a target that exists, or parts
            of another source, seed or other settings; before anything is generated.
    """
    source, target = Path(source), Path(target)
    lines = read_prompts(source)
    prompts = [encode_text(line["prompt"], tokenizer)[0] for line in lines]
    if target.exists():
        raise ValueError(f"output must be a file that does not exist, got {target}")
    parts, state = target.with_name(target.name + ".parts"), processes()
    check_parts(parts, {"input": hashlib.sha256(source.read_bytes()).hexdigest(), "seed": seed, "settings": settings})
    done = {record["index"] for record in finished(parts)}
    state.wait_for_everyone()  # nobody writes before all have seen what is there
    waiting = sorted(set(range(len(lines))) - done, key=lambda index: (-len(prompts[index]), index))
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    own = batches[state.process_index :: state.num_processes]
    with open(parts / f"{state.process_index}.jsonl", "a", encoding="utf-8") as file:
        for batch in tqdm(own, disable=None if state.is_local_main_process else True):
            texts = generate_batch(model, tokenizer, [prompts[index] for index in batch], batch, seed, settings)
            records = [{"index": index, **text} for index, text in zip(batch, texts, strict=True)]
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        texts = {record.pop("index"): record for record in finished(parts)}
        partial = target.with_name(target.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line | texts[index]) + "\n" for index, line in enumerate(lines))
        os.replace(partial, target)
        shutil.rmtree(parts)
    state.wait_for_everyone()


def processes() -> PartialState:
    """Those of `accelerate launch`, or this one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def read_prompts(source: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            form = '{"prompt": "..."}'
            raise ValueError(f"input must have lines like {form}, got {text!r} in line {number} of {source}")
        lines.append(line)
    return lines


def check_parts(parts: Path, settings: dict[str, Any]) -> None:
    """Writes down what the parts are made of, and drops a line that a kill has left unfinished.

    Raises:
        ValueError: if they were made of something else.
    """
    state, path = processes(), parts / "settings.json"
    if state.is_main_process:
        parts.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, settings)
        for part in parts.glob("*.jsonl"):
            whole = part.read_bytes().rpartition(b"\n")
            if whole[2]:
                part.write_bytes(whole[0] + whole[1])
    state.wait_for_everyone()
    found = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(settings)).items():
        if found[name] != value:
            raise ValueError(f"output must be that of the same {name}, got {parts} of {found[name]}, not {value}")


def finished(parts: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(parts.glob("*.jsonl")):
        yield from map(json.loads, part.read_text(encoding="utf-8").splitlines())


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[torch.Tensor],
    indices: list[int],
    seed: int,
    settings: dict[str, Any],
) -> list[dict[str, str]]:
    """`text`, and with `max_new_tokens` the `completion`, of prompts (tokens,) that are padded on the left."""
    width = max(map(len, prompts))
    pad = model.config.mask_token_id if model.config.pad_token_id is None else model.config.pad_token_id
    input_ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0), value=pad) for ids in prompts])
    lengths = torch.tensor(list(map(len, prompts)))
    attention_mask = (torch.arange(width) >= width - lengths[:, None]).long()
    generators = [torch.Generator(model.device).manual_seed(row_seed(seed, index)) for index in indices]
    sequences = model.generate(
        input_ids.to(model.device), attention_mask.to(model.device), generator=generators, **settings
    ).cpu()
    rows = [row[width - length :] for row, length in zip(sequences, lengths.tolist(), strict=True)]
    texts = [{"text": text} for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    if settings.get("max_new_tokens"):
        completions = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
        texts = [text | {"completion": new} for text, new in zip(texts, completions, strict=True)]
    return texts


def row_seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:7], "big")


__all__ = ["generate_file", "processes"]
