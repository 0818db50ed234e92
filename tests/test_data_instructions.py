"""Instructions: what is learned of a row, and that a model which learned it answers and stops."""

import json

import datasets
import pytest
import torch
import train_vmd
from test_scripts import SMALL
from transformers import AutoModelForMaskedLM, AutoTokenizer

from vmd_hf.data.characters import character_tokenizer
from vmd_hf.data.instructions import instruction_dataset, load_instructions
from vmd_hf.data.text import collate

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}[EOS]{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz :?")
    tokenizer.chat_template = template
    return tokenizer


def message(role, content):
    return {"role": role, "content": content}


def learned(tokenizer, row):
    """The texts of a row and of what is learned of it."""
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(row["labels"][row["labels"] != -100])


@pytest.mark.parametrize(
    ("row", "text", "answers"),
    [
        ({"prompt": "hi? ", "completion": "yes"}, "hi? yes[EOS]", "yes[EOS]"),
        (
            {"prompt": [message("user", "hi?")], "completion": [message("assistant", "yes")]},
            "u:hi?a:yes[EOS]",
            "yes[EOS]",
        ),
        (
            {
                "messages": [
                    message(*turn) for turn in (("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w"))
                ]
            },
            "u:xa:y[EOS]u:za:w[EOS]",
            "y[EOS]w[EOS]",
        ),
        (
            {"messages": [message("user", "x"), message("assistant", "y"), message("user", "z")]},
            "u:xa:y[EOS]u:z",
            "y[EOS]",
        ),
    ],
)
def test_answers_are_learned_with_their_end(row, text, answers):
    tokenizer = chat_tokenizer()
    (found,) = instruction_dataset([row], tokenizer, 32)
    assert learned(tokenizer, found) == (text, answers)
    kept = found["labels"] != -100
    assert torch.equal(found["labels"][kept], found["input_ids"][kept])


def test_a_template_without_an_end_gets_one():
    tokenizer = chat_tokenizer(TEMPLATE.replace("[EOS]", ""))
    (row,) = instruction_dataset([{"messages": [message("user", "x"), message("assistant", "y")]}], tokenizer, 32)
    assert learned(tokenizer, row) == ("u:xa:y[EOS]", "y[EOS]")


def test_long_rows_are_left_out_and_counted_and_batches_are_padded(caplog):
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "a", "completion": "b" * count} for count in (1, 3, 7)]
    dataset = instruction_dataset(rows, tokenizer, 5)
    assert [len(row["input_ids"]) for row in dataset] == [3, 5] and "1 of 3 rows are left out" in caplog.text
    batch = collate(list(dataset), tokenizer.pad_token_id)
    assert batch["labels"].tolist()[0] == [-100, 1, tokenizer.eos_token_id, -100, -100]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    with pytest.raises(ValueError, match="sequence_length must hold at least one of 3 rows, got 2"):
        instruction_dataset(rows, tokenizer, 2)


@pytest.mark.parametrize(
    ("row", "template", "error"),
    [
        ({"text": "a"}, TEMPLATE, r"rows must have prompt and completion, or messages, got \['text'\]"),
        ({"messages": [message("assistant", "a")]}, None, "must have a chat template for messages"),
        (
            {"messages": [message("user", "a"), message("assistant", "b")]},
            "{{ messages | length }}" + TEMPLATE,
            "begins with its prompt",
        ),
    ],
)
def test_what_cannot_be_read_is_an_error(row, template, error):
    tokenizer = chat_tokenizer(template)
    tokenizer.add_tokens(list("0123456789"))
    with pytest.raises(ValueError, match=error):
        instruction_dataset([row], tokenizer, 32)


def test_a_source_without_a_validation_split_holds_rows_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": str(i), "completion": "x"}) for i in range(100)))
    splits = load_instructions(path, num_held_out=3)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 97, "validation": 3}
    assert len({row["prompt"] for rows in splits.values() for row in rows}) == 100
    path.write_text(json.dumps({"prompt": "", "completion": "x"}))
    with pytest.raises(ValueError, match="source must have a train split of at least two rows"):
        load_instructions(path)


def test_a_model_that_learned_answers_gives_them_and_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = character_tokenizer("abcdef?")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "rows.jsonl"
    answers = {"a": "ff", "b": "cde", "c": "d"}
    rows = [{"prompt": f"{name}?", "completion": answer} for name, answer in answers.items()]
    source.write_text("\n".join(map(json.dumps, rows * 40)))
    arguments = [f"--source={source}", f"--tokenizer={tmp_path / 'tokenizer'}", "--sequence_length=16", *SMALL]
    arguments += [
        "--task=instructions",
        "--block_size=2",
        "--latent_size=0",
        "--objective=per_step",
        "--objective_steps=2",
    ]
    arguments += ["--hidden_size=32", "--max_steps=120", "--learning_rate=0.01", f"--output_dir={tmp_path / 'out'}"]
    train_vmd.main([*arguments, "--num_eval_rows=4"])
    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForMaskedLM, AutoTokenizer))
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    filled = model.generate(**batch, max_new_tokens=10, num_steps=2)
    assert tokenizer.batch_decode(filled[:, 2:], skip_special_tokens=True) == list(answers.values())
