"""Sampled text judged over temperatures, MAUVE, and the evaluation of streams."""

import json
import math
import sys
from types import SimpleNamespace

import datasets
import evaluate_vmd
import numpy as np
import pytest
import torch
from helpers import tiny_model
from matplotlib.image import imread
from test_metrics import digit_model
from transformers import BertConfig, BertModel

from vmd_hf.data.characters import character_tokenizer
from vmd_hf.data.text import load_documents, text_datasets
from vmd_hf.evaluation.text import draw_frontier, evaluate_quality, evaluate_samples, mauve
from vmd_hf.extras import import_extra

ALPHABET = "abcdefghi "


def save_model(folder, **settings):
    """One that reads and writes sixteen of ten characters."""
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.save_pretrained(folder)
    settings |= {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    model = tiny_model(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **settings)
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A dataset in three files for each split, the last of which is broken (a stream opens one in advance); what
    `datasets` caches goes beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for split, word in (("train", "abc"), ("validation", "ghi"), ("test", "def")):
        rows = [json.dumps({"text": f"{word} fed cab " * (4 + index)}) for index in range(6)]
        for file in range(2):
            (tmp_path / "data" / f"{split}-{file:05}-of-00003.jsonl").write_text("\n".join(rows))
        (tmp_path / "data" / f"{split}-00002-of-00003.jsonl").write_text("{broken")
    return tmp_path / "data"


def test_samples_of_a_stream_are_judged_over_temperatures(source, tmp_path):
    """And no more is read than the documents that are asked for."""
    model, tokenizer = save_model(tmp_path / "model")
    save_model(tmp_path / "judge", block_size=1, latent_size=0)
    arguments = [f"--model={tmp_path / 'model'}", "--task=text", f"--source={source}", "--num_texts=6"]
    judged = ["--num_steps", "2", "4", "--temperatures", "1.5", "0.05", f"--judge={tmp_path / 'judge'}"]
    evaluate_vmd.main([*arguments, *judged, "--streaming", "--num_documents=5", f"--output={tmp_path / 'r.json'}"])
    tables = json.loads((tmp_path / "r.json").read_text())
    assert all("first 5 documents" in title for title in tables)
    _, bounds, samples, quality = tables.values()

    texts = [f"def fed cab {'def fed cab ' * (3 + index)}" for index in range(5)]
    rows = text_datasets({"test": texts}, tokenizer, 16)["test"]
    assert {bound["num_tokens"] for bound in bounds} == {rows.num_rows * 16}

    names = [(steps, temperature) for steps in (2, 4) for temperature in (1.5, 0.05)]
    assert [(row["num_steps"], row["temperature"]) for row in samples] == names
    real, *found = quality
    assert (real["num_steps"], real["temperature"]) == ("(test rows)", None)
    assert [(row["num_steps"], row["temperature"]) for row in found] == names
    assert 0.3 < real["known_words"] < 0.7  # "def" is not among the words of training, and the first and last are cut
    for hot, cold in (found[:2], found[2:]):
        assert cold["unigram_entropy"] < hot["unigram_entropy"]
    for (steps, temperature), row in zip(names, samples, strict=True):
        masks = torch.full((6, 16), tokenizer.mask_token_id)
        generator, settings = torch.Generator().manual_seed(0), {"remasking": "random", "do_sample": True}
        ids = model.generate(masks, num_steps=steps, temperature=temperature, generator=generator, **settings)
        assert tokenizer.decode(ids[0]) == row["sample"]
    assert imread(tmp_path / "r_frontier.png").std() > 0
    with pytest.raises(ValueError, match="where must be empty"):
        evaluate_vmd.main([*arguments, "--streaming", "--where", "a=b", f"--output={tmp_path / 's.json'}"])
    with pytest.raises(datasets.exceptions.DatasetGenerationError):  # whereas without it all is
        load_documents(source)


def test_the_frontier_has_a_line_for_each_number_of_steps(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: drawn.append(figure))
    points = {("(test rows)", None): (3, 9), (2, 1.5): (4, 30), (2, 0.5): (1, 2), (1, 1.0): (2, 20)}
    rows = [
        {"num_steps": steps, "temperature": temperature, "unigram_entropy": entropy, "judge_perplexity": perplexity}
        for (steps, temperature), (entropy, perplexity) in points.items()
    ]
    draw_frontier(rows, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"real text": [[3, 9]], "2 steps": [[1, 2], [4, 30]], "1 steps": [[2, 20]]}


def test_without_temperatures_samples_are_drawn_at_the_models_own():
    model, tokenizer = digit_model()
    expected, hotter = evaluate_samples(model, tokenizer, 8, [], [2], 3)[1], [2.5]
    assert evaluate_samples(model, tokenizer, 8, [], [2], 3, temperatures=[1.0])[1] == expected
    model.generation_config.temperature = hotter[0]
    rows, texts = evaluate_samples(model, tokenizer, 8, [], [2], 3)
    assert rows[0]["temperature"] == 2.5 and texts != expected
    assert texts == evaluate_samples(model, tokenizer, 8, [], [2], 3, temperatures=hotter)[1]


def test_repeating_oneself_pleases_a_judge_and_shows_in_the_entropy():
    real, dull = ["1 2 3", "4 5 6"], ["1 1 1", "1 1 1"]
    first, second = evaluate_quality(real, [dull], words={"1"})
    assert (first["unigram_entropy"], second["unigram_entropy"]) == (pytest.approx(math.log(6)), 0)
    assert (first["known_words"], second["known_words"]) == (pytest.approx(1 / 6), 1)
    assert second["distinct_1"] == pytest.approx(1 / 6) and "mauve" not in first


def test_mauve_is_that_of_its_library_for_the_states_of_last_tokens(tmp_path, monkeypatch):
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=6, **sizes)).eval()
    model.save_pretrained(tmp_path)
    calls = []

    def compute_mauve(p_features, q_features, verbose):
        calls.append((p_features, q_features))
        return SimpleNamespace(mauve=np.float64(len(calls) / 4))

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute_mauve))
    real, sampled = ["abc", "d ef"], [["i", ""], ["ab", "abcdefgh"]]
    rows = evaluate_quality(real, sampled, featuriser=str(tmp_path))
    assert [row["mauve"] for row in rows] == [None, 0.25, 0.5]
    expected = (real, ["i", " "], real, ["ab", "abcdef"])  # no text is empty, and none longer than can be read
    for texts, found in zip(expected, (part for call in calls for part in call), strict=True):
        for text, row in zip(texts, found, strict=True):
            with torch.no_grad():
                state = model(torch.tensor([[tokenizer.get_vocab()[letter] for letter in text]])).last_hidden_state
            np.testing.assert_allclose(row, state[0, -1].numpy(), rtol=1e-5, atol=1e-6)


def test_without_the_library_mauve_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    save_model(tmp_path)
    monkeypatch.setitem(sys.modules, "mauve", None)  # as if it were not installed
    message = r"pip install vmd_hf\[mauve\]"
    with pytest.raises(ImportError, match=message):
        import_extra("mauve", "mauve")
    with pytest.raises(ImportError, match=message):
        mauve(["a"], [["b"]], tmp_path)
    with pytest.raises(ImportError, match=message):  # before anything is measured
        evaluate_vmd.main([f"--model={tmp_path}", "--task=text", f"--featuriser={tmp_path}", "--source=none"])
