"""Loops of antibodies: rows, exact probabilities, numbers of generated loops, and the comparison around a BERT."""

import json
import math
from collections import Counter
from itertools import combinations

import compare_antibodies
import numpy as np
import pytest
import torch
from helpers import seeded, tiny_model
from matplotlib.image import imread
from safetensors.torch import load_file
from test_lora import trained_weights
from transformers import BertConfig, BertForMaskedLM

from vmd_hf import VMDForMaskedDiffusion, nelbo
from vmd_hf.data import antibodies
from vmd_hf.data.antibodies import (
    AFTER,
    BEFORE,
    ROW_LENGTH,
    antiberty_folder,
    antibody_dataset,
    antibody_tokenizer,
    loop_log2_probabilities,
    loop_sequences,
    loops_of,
)
from vmd_hf.evaluation import comparison
from vmd_hf.evaluation.antibodies import evaluate_loop_bounds, evaluate_loop_samples, mean_identity
from vmd_hf.hub import load_model
from vmd_hf.training_run import freeze_backbone

LOOPS = ["AKDYFDY", "AKGGWYFDLYYYGMDV", "ARDY", "AKDYFDY"]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def tiny_bert(**settings):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=25, initializer_range=0.3, **sizes, **settings))


def around(bert, **settings):
    settings = {"mask_token_id": 4, "objective": "per_step", "latent_size": 0, "kl_warmup_steps": 0} | settings
    return VMDForMaskedDiffusion.from_masked_lm(bert, **settings).eval()


def test_rows_are_a_chain_whose_loop_is_labelled():
    tokenizer = antibody_tokenizer()  # as in the vocabulary file of AntiBERTy
    assert tokenizer.convert_ids_to_tokens(range(25)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]
    assert tokenizer("A[MASK]Y")["input_ids"] == [2, 5, 4, 24, 3]
    rows = antibody_dataset(LOOPS)[:]
    assert rows["input_ids"].shape == rows["labels"].shape == (4, ROW_LENGTH)
    assert len(BEFORE) == 96 and BEFORE[-1] == "C" and AFTER[0] == "W"
    columns = (rows[name] for name in ("input_ids", "attention_mask", "labels"))
    for row, mask, labels, loop in zip(*columns, LOOPS, strict=True):
        chain = [2, *(5 + RESIDUES.index(residue) for residue in BEFORE + loop + AFTER), 3]
        assert row[mask != 0].tolist() == chain and (row[mask == 0] == 0).all()
        assert (labels != -100).nonzero().flatten().tolist() == list(range(97, 97 + len(loop)))
        assert torch.equal(row[labels != -100], labels[labels != -100])
    assert loops_of(rows["input_ids"], rows["labels"]) == LOOPS
    wrong = rows["input_ids"].clone()
    wrong[0, 98], wrong[1, 97] = 3, 4  # tokens that are no amino acids
    assert loops_of(wrong, rows["labels"]) == [None, None, *LOOPS[2:]]
    for loop in ("", "A" * 17):
        with pytest.raises(ValueError, match=f"loops must have 1 to 16 residues, got '{loop}'"):
            antibody_dataset(["A", loop])


def test_the_probabilities_are_those_of_the_draws(tmp_path, monkeypatch):
    """By other routes than the normaliser's: frequencies, and a sum over residues."""
    pytest.importorskip("olga", reason="needs olga: pip install vmd_hf[olga]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    number = 3000
    drawn = loop_sequences(number, 5)
    assert loop_sequences(40, 5) == drawn[:40] and {*map(len, drawn)} <= set(range(1, 17))
    of_length = [loop for loop in drawn if len(loop) == 12]
    for start in ("A", "AK", "AR", "V"):  # AK as in the gene, which fewer than half of all heavy chains have
        (expected,) = 2 ** loop_log2_probabilities([start + "X" * (12 - len(start))])
        found = sum(loop.startswith(start) for loop in of_length)
        assert abs(found - expected * len(of_length)) < 4 * (expected * len(of_length)) ** 0.5 + 1
    assert 2 ** loop_log2_probabilities(["AKXXXXXXXXXX"])[0] > 0.5
    parts = 2 ** loop_log2_probabilities([f"AK{residue}YFDY" for residue in RESIDUES])
    assert parts.sum() == pytest.approx(2 ** loop_log2_probabilities(["AKXYFDY"])[0], rel=1e-6)
    assert np.isneginf(loop_log2_probabilities([None, "", "A" * 17])).all()


def test_identity_is_the_mean_over_pairs():
    pairs = [pair for pair in combinations(["AAC", "AAD", "ACC", "DY", "DD", "K"], 2) if len(pair[0]) == len(pair[1])]
    shares = [sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs]
    assert len(pairs) == 4 and mean_identity(["AAC", "AAD", "ACC", "DY", "DD", "K"]) == pytest.approx(np.mean(shares))
    assert mean_identity(["A", "A"]) == 1 and math.isnan(mean_identity(["A", "DY"]))


def uniform_truth(loops):
    return np.array([-np.inf if loop is None else -len(loop) * math.log2(20) for loop in loops])


def test_a_uniform_model_is_as_many_bits_above_a_uniform_truth_as_it_has_more_tokens():
    model = tiny_model(vocab_size=25, mask_token_id=4, pad_token_id=0, max_position_embeddings=ROW_LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    bits = np.mean([len(loop) for loop in LOOPS]) * math.log2(23 / 20)  # neither the mask nor the pad token
    for row in evaluate_loop_bounds(model, LOOPS, [1, 16], truth=uniform_truth):
        assert row["above"] == pytest.approx(bits, abs=1e-4)
    (row,) = evaluate_loop_samples(model, LOOPS * 30, [1], truth=uniform_truth)
    whole = [loop for loop in row["loops"] if loop is not None]
    assert row["possible"] == len(whole) / 120 == pytest.approx(np.mean([(20 / 23) ** len(x) for x in LOOPS]), abs=0.2)
    assert [len(loop or real) for loop, real in zip(row["loops"], LOOPS * 30, strict=True)] == [7, 16, 4, 7] * 30
    assert row["distinct"] > 0.9 and row["real distinct"] == 3 / 120
    assert row["sampled identity"] == pytest.approx(1 / 20, abs=0.05) and row["real identity"] > 0.9


def test_padding_does_not_change_what_a_loop_is_worth():
    model = around(tiny_bert(), latent_type="chain", latent_size=3)
    (together,) = evaluate_loop_bounds(model, LOOPS, [1], truth=uniform_truth)
    alone = []
    for row in antibody_dataset(LOOPS):
        ids, labels = (row[name][row["attention_mask"] != 0][None] for name in ("input_ids", "labels"))
        alone.append(nelbo(model, ids, labels).nelbo.item() / math.log(2))
    assert together["bits"] == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("latent", [{"latent_type": "chain", "latent_size": 3}, {"latent_size": 2}])
def test_a_frozen_backbone_leaves_the_latent_path_to_train(latent):
    model = around(tiny_bert(), **latent)
    freeze_backbone(model)
    parts = {"chain"} if model.chain is not None else {"latent_encoder", "model.conditioner", "model.modulation"}
    assert {name for name in trained_weights(model) if not name.startswith(tuple(parts))} == set()
    assert all(any(name.startswith(part) for name in trained_weights(model)) for part in parts)
    for model in (around(tiny_bert()), tiny_model()):
        with pytest.raises(ValueError, match="freeze_backbone needs a language model of transformers with a latent"):
            freeze_backbone(model)


def test_antiberty_is_asked_for(monkeypatch):
    monkeypatch.setattr(antibodies, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps antiberty==0\.1\.3"):
        antiberty_folder()


def test_rows_around_a_bert_are_compared(tmp_path, monkeypatch):
    def draws(number, seed, repertoire):
        generator = seeded(seed)
        return [
            f"C{loop}W" for loop in (LOOPS[int(torch.randint(4, (1,), generator=generator))] for _ in range(number))
        ]

    monkeypatch.setattr(antibodies, "receptor_sequences", draws)
    monkeypatch.setattr(antibodies, "log2_probabilities", lambda loops, *args, **kwargs: uniform_truth(loops))
    monkeypatch.setattr(comparison, "matmul_peak", lambda *args, **kwargs: 1e12)
    tiny_bert().save_pretrained(tmp_path / "bert")
    rows, folder = list(compare_antibodies.ROWS), tmp_path / "out"
    arguments = ["--num_sequences=5", "--num_draws=2", "--max_steps=2", "--num_train_rows=20", "--num_eval_rows=5"]
    arguments += ["--per_device_train_batch_size=4", f"--backbone={tmp_path / 'bert'}", f"--output_dir={folder}"]
    compare_antibodies.main([*arguments, "--disable_tqdm=true", "--rows", *rows])
    results = json.loads((folder / "results.json").read_text())
    assert [result["row"] for result in results] == rows == ["bert", "gaussian", "chain", "lora", "lora-chain"]
    assert [len(result["training"]) for result in results] == [0, 1, 1, 1, 2]
    for result in results:
        settings = Counter((bound["num_steps"], bound["num_draws"]) for bound in result["bounds"])
        several = [(1, 2), (2, 2), (4, 2)] if result["row"] == "gaussian" else []
        assert settings == Counter([(1, 1), (2, 1), (4, 1), (16, 1), *several])
        assert [sample["num_steps"] for sample in result["samples"]] == [1, 2, 4, 16]
        assert [len(sample["loops"]) for sample in result["samples"]] == [5] * 4
    assert len(compare_antibodies.bound_lines(results)) == 6
    assert [line["row"] for line in compare_antibodies.sample_lines(results)][::4] == [*rows, "real"]
    assert imread(folder / "frontier.png").shape[1] == 1320

    kept = load_file(tmp_path / "bert" / "model.safetensors")
    for row in ("gaussian", "chain"):
        weights = load_file(folder / f"{row}-0" / "stage-0" / "model.safetensors")
        assert all(torch.equal(weights[f"model.masked_lm.{name}"], value) for name, value in kept.items())
    adapted = load_model(folder / "lora-chain-0" / "stage-1", "cpu")
    names = [name for name, _ in adapted.named_parameters()]
    assert adapted.config.num_states == 64 and any("lora_A" in name for name in names)

    monkeypatch.setattr(comparison, "train", lambda *args: pytest.fail("it trained again"))
    compare_antibodies.main([*arguments, "--disable_tqdm=true", "--rows", "bert", "chain"])
    assert json.loads((folder / "results.json").read_text()) == results
