"""Receptor sequences: the file of draws, rows, the exact probabilities, and the numbers that are made of them."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers import tiny_model

from vmd_hf.data import receptors
from vmd_hf.data.receptors import (
    AMINO_ACIDS,
    ROW_LENGTH,
    log2_probabilities,
    receptor_dataset,
    receptor_sequences,
    receptor_tokenizer,
    sequences_of,
)
from vmd_hf.evaluation.receptors import (
    above_truth,
    evaluate_receptor_bounds,
    evaluate_receptor_samples,
    mean_and_error,
    sample_statistics,
)

END = 22


def needs_olga():
    pytest.importorskip("olga", reason="needs olga: pip install vmd_hf[olga]")


def test_rows_are_amino_acids_and_then_end_tokens():
    tokenizer = receptor_tokenizer()
    assert tokenizer.convert_ids_to_tokens(range(20)) == list(AMINO_ACIDS) and tokenizer.eos_token_id == END
    longest = "C" * (ROW_LENGTH - 1)
    rows = torch.as_tensor(receptor_dataset(["CAF", longest])[:]["input_ids"])
    assert rows.shape == (2, ROW_LENGTH)
    assert rows[0].tolist() == [1, 0, 4] + [END] * 25 and rows[1, -2:].tolist() == [1, END]
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == "CAF"
    assert sequences_of(rows) == ["CAF", longest]
    with pytest.raises(ValueError, match="sequences must have fewer than 28 amino acids, got 'C"):
        receptor_dataset(["C" * ROW_LENGTH])
    wrong = rows[:1].repeat(4, 1)
    wrong[0, 9] = 3  # behind the end
    wrong[1, 1] = 20  # a mask
    wrong[2] = END  # nothing
    wrong[3] = 1  # no end
    assert sequences_of(wrong) == [None] * 4


def test_draws_are_kept_in_a_file(tmp_path, monkeypatch):
    needs_olga()
    state = np.random.get_state()[1].tolist()
    drawn = receptor_sequences(40, 7, tmp_path)
    assert np.random.get_state()[1].tolist() == state
    assert len(drawn) == 40 and len({*drawn}) > 35 and {*"".join(drawn)} <= {*AMINO_ACIDS}
    assert receptor_sequences(10, 7, tmp_path) == drawn[:10] and receptor_sequences(40, 8, tmp_path) != drawn
    assert len(list(tmp_path.iterdir())) == 3  # nothing half-written
    monkeypatch.setattr(receptors, "_receptors", lambda *args: pytest.fail("it drew again"))
    assert receptor_sequences(40, 7, tmp_path) == drawn
    with pytest.raises(ValueError, match="num_sequences must be at least 1, got 0"):
        receptor_sequences(0, 7, tmp_path)


def test_true_probabilities_sum_to_one_and_are_those_of_the_draws(tmp_path):
    """By another route than the normaliser's: all sequences of a length from those of their beginnings, and the
    frequencies of what is drawn."""
    needs_olga()
    whole = 2 ** log2_probabilities(["C" + "X" * (length - 2) + "F" for length in range(2, ROW_LENGTH)])
    assert whole.sum() == pytest.approx(1, abs=2e-4)  # few end with V
    parts = 2 ** log2_probabilities([f"CAS{first}{second}QYF" for first, second in product(AMINO_ACIDS, repeat=2)])
    (together,) = 2 ** log2_probabilities(["CASXXQYF"])
    assert parts.sum() == pytest.approx(together, rel=1e-6)
    number = 4000
    lengths = np.bincount([len(sequence) for sequence in receptor_sequences(number, 3, tmp_path)], minlength=28)
    for length in range(10, 22):
        expected = number * whole[length - 2]
        assert abs(lengths[length] - expected) < 4 * expected**0.5
    assert np.isneginf(
        log2_probabilities(["CAX" * 9 + "F", "AASF", "CASSS", "CAF" * 9, None, ""])[[0, 1, 2, 4, 5]]
    ).all()


def fake_truth(sequences):
    """Uniform over the 20 sequences of one amino acid."""
    return np.array([-math.log2(20) if sequence and len(sequence) == 1 else -np.inf for sequence in sequences])


def test_the_difference_from_the_truth_is_paired():
    truth = np.array([10.0, 30.0, 20.0, 40.0])
    result = above_truth(truth + np.array([1, 2, 1, 2]), truth)
    error = 0.5 * (4 / 3) ** 0.5 / 2  # deviations of 1/2 from 1.5
    assert result["bits"] == 26.5 and result["truth"] == 25 and result["above"] == 1.5
    assert (result["low"], result["high"]) == pytest.approx((1.5 - 1.96 * error, 1.5 + 1.96 * error))
    assert mean_and_error(np.array([1.0, 3.0])) == (2, 1) and math.isnan(mean_and_error(np.array([1.0]))[1])


def test_what_the_truth_makes_of_samples():
    def truth(sequences):
        return np.array([{"A": -1.0, "C": -2.0, "D": -5.0}.get(sequence, -np.inf) for sequence in sequences])

    row = sample_statistics(["A", "A", "C", None, "Y"], ["A", "D"], truth)
    assert row["possible"] == 0.6 and row["distinct"] == pytest.approx(2 / 3)
    assert row["sampled bits"] == pytest.approx(4 / 3) and row["sampled 50 %"] == 1 and row["real bits"] == 3
    assert math.isnan(sample_statistics([None], ["A"], truth)["sampled bits"])


@pytest.mark.parametrize(
    "latent", [{"latent_size": 0}, {"latent_type": "chain", "latent_size": 3}, {"latent_size": 4}]
)
def test_a_model_is_measured_against_the_truth(latent):
    """A model whose columns are independent and known: the first uniform over amino acids, the others end tokens."""
    settings = {
        "vocab_size": 23,
        "mask_token_id": 20,
        "pad_token_id": 21,
        "eos_token_id": END,
        "objective": "per_step",
    }
    model = tiny_model(max_position_embeddings=ROW_LENGTH, tie_word_embeddings=False, **settings, **latent)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embeddings.embed_positions.weight[:, 0] = -1.0
        model.model.embeddings.embed_positions.weight[0, 0] = 1.0
        # The norm makes of it a vector whose first entry is +-5.6, and the others nearly nothing.
        model.lm_head.weight[:20, 0] = 5.0
        model.lm_head.weight[END, 0] = -5.0
    for row in evaluate_receptor_bounds(model, ["C", "Y", "F"], [1, 2], truth=fake_truth):
        assert row["truth"] == pytest.approx(math.log2(20)) and row["above"] == pytest.approx(0, abs=1e-4)
    orders = {
        (row["num_steps"], row["order"]) for row in evaluate_receptor_bounds(model, ["C"], [1, 2], truth=fake_truth)
    }
    both = (
        {(2, "random"), (2, "left_to_right")}
        if latent.get("latent_type") or not latent["latent_size"]
        else {(2, "random")}
    )
    assert orders == {(1, None)} | both
    for row in evaluate_receptor_samples(model, ["C", "Y"], [1, 2], num_samples=30, truth=fake_truth):
        assert row["possible"] == 1 and row["distinct"] <= 20 / 30
        assert row["sampled bits"] == pytest.approx(row["real bits"]) == pytest.approx(math.log2(20))
