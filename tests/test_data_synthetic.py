import math
from itertools import product

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from vmd_hf.data.synthetic import (
    independent_accuracy,
    independent_marginals_kl,
    joint_counts,
    joint_metrics,
    synthetic_dataset,
    synthetic_tokenizer,
    target_distribution,
)

TASKS = [
    ("two_token_deterministic", None),
    ("two_token_nonuniform", None),
    ("two_token_correlated", 0.6),
    ("d1", None),
    ("d2", None),
]


def enumerate_target(name):
    """Probability of each sequence, written out sequence by sequence."""
    pairs = [(k, (k + 1) % 10) for k in range(10)]
    if name == "two_token_deterministic":
        return dict.fromkeys(pairs, 1 / 10)
    if name == "two_token_nonuniform":
        return {pair: (pair[0] + 1) / 55 for pair in pairs}
    if name == "two_token_correlated":  # correlation 0.6: 1/10 (0.6 + 0.4/10), 1/10 (0.4/10)
        return {pair: 0.064 if pair in pairs else 0.004 for pair in product(range(10), repeat=2)}
    if name == "d1":
        return {(k, (k + 1) % 10, (k + 2) % 10, (k + 3) % 10): 1 / 10 for k in range(10)}
    return {first + second: 1 / 100 for first in pairs for second in pairs}


@pytest.mark.parametrize("name, correlation", TASKS)
def test_target_is_the_enumerated_distribution(name, correlation):
    expected = enumerate_target(name)
    target = target_distribution(name, correlation)
    assert target.dtype == torch.float64
    assert target.shape == (10,) * len(next(iter(expected)))
    assert target.sum().item() == pytest.approx(1, abs=1e-12)
    assert (target > 0).sum() == len(expected)
    for sequence, probability in expected.items():
        assert target[sequence].item() == pytest.approx(probability, abs=1e-12)


def test_full_correlation_is_the_deterministic_pair_and_none_is_independence():
    torch.testing.assert_close(
        target_distribution("two_token_correlated", 1.0), target_distribution("two_token_deterministic")
    )
    torch.testing.assert_close(
        target_distribution("two_token_correlated", 0), torch.full((10, 10), 0.01, dtype=torch.float64)
    )


@pytest.mark.parametrize("name, correlation", TASKS)
def test_dataset_has_the_frequencies_of_the_target(name, correlation):
    num_rows = 50_000
    rows = synthetic_dataset(name, num_rows, seed=0, correlation=correlation)[:]["input_ids"]
    assert rows.dtype == torch.int64
    expected = enumerate_target(name)
    counts = {sequence: 0 for sequence in expected}
    for row in rows.tolist():
        counts[tuple(row)] += 1  # a row outside the support is a KeyError
    for sequence, probability in expected.items():
        standard_error = math.sqrt(num_rows * probability * (1 - probability))
        assert abs(counts[sequence] - num_rows * probability) < 5 * standard_error


def test_dataset_depends_on_the_seed_alone():
    first, again, other = (synthetic_dataset("d2", 100, seed=seed)[:]["input_ids"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokenizer_round_trip_and_reload(tmp_path):
    tokenizer = synthetic_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert dict(candidate("9012")) == {"input_ids": [9, 0, 1, 2], "attention_mask": [1, 1, 1, 1]}
        assert candidate.decode([9, 0, 1, 2]) == "9012"
        assert candidate.decode([3, 10, 11]) == "3[MASK][PAD]"
        assert candidate("3[MASK]").input_ids == [3, 10]
        assert (candidate.mask_token_id, candidate.pad_token_id, len(candidate)) == (10, 11, 12)
        assert candidate.eos_token is None and candidate.unk_token is None


def test_rows_pass_through_the_collator():
    collator = DataCollatorForLanguageModeling(synthetic_tokenizer(), mlm=False)
    (batch,) = DataLoader(synthetic_dataset("d1", 8, seed=0), batch_size=8, collate_fn=collator)
    assert batch["input_ids"].shape == (8, 4)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert torch.equal((batch["input_ids"][:, :1] + torch.arange(4)) % 10, batch["input_ids"])


@pytest.mark.parametrize(
    "name, correlation, kl, accuracy",
    [
        ("two_token_deterministic", None, math.log(10), 0.1),
        # The entropy of P(k); sum_k P(k)^2 = (1 + 4 + ... + 100) / 55^2.
        ("two_token_nonuniform", None, -sum(k / 55 * math.log(k / 55) for k in range(1, 11)), 385 / 3025),
        # 0.64 of the mass is 6.4 times as likely as under independence, 0.36 of it 0.4 times.
        ("two_token_correlated", 0.6, 0.64 * math.log(6.4) + 0.36 * math.log(0.4), 1.0),
        ("two_token_correlated", 0.0, 0.0, 1.0),
        ("d1", None, math.log(1000), 0.001),
        ("d2", None, math.log(100), 0.01),
    ],
)
def test_what_independence_forces(name, correlation, kl, accuracy):
    assert independent_marginals_kl(name, correlation) == pytest.approx(kl, abs=1e-12)
    assert independent_accuracy(name, correlation) == pytest.approx(accuracy, abs=1e-12)


def test_joint_counts():
    samples = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 10], [-1, 2, 3, 4], [0, 0, 0, 11]])
    counts = joint_counts(samples)
    assert counts.shape == (10, 10, 10, 10)
    assert counts[1, 2, 3, 4] == 2 and counts[9, 9, 9, 9] == 1
    assert counts.sum() == 3


def test_joint_metrics_by_hand():
    # In the support: (0, 1) four times and (1, 2) once. Outside: a wrong pair, a mask left over, two masks.
    samples = torch.tensor([[0, 1]] * 4 + [[1, 2], [0, 0], [3, 10], [10, 10]])
    metrics = joint_metrics(samples, target_distribution("two_token_deterministic"))
    kl = 0.1 * math.log(0.1 / (4 / 8)) + 0.1 * math.log(0.1 / (1 / 8)) + 8 * 0.1 * math.log(0.1 / (0.5 / 8))
    assert metrics == {
        "accuracy": 5 / 8,
        "accuracy_standard_error": pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 8)),
        "kl": pytest.approx(kl),
        "kl_floor": 9 / 16,
        "num_samples": 8,
    }
    samples = torch.tensor([[k, (k + 1) % 10] for k in range(10) for _ in range(k + 1)])  # 55 rows, as the target has
    metrics = joint_metrics(samples, target_distribution("two_token_nonuniform"))
    assert metrics["accuracy"] == 1 and metrics["accuracy_standard_error"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-12)


def test_kl_floor_is_the_mean_of_perfect_samples():
    target = target_distribution("two_token_deterministic")
    rows = synthetic_dataset("two_token_deterministic", 200_000, seed=0)[:]["input_ids"]
    results = [joint_metrics(samples, target) for samples in rows.split(1000)]
    # 2 N KL is chi-square with 9 degrees of freedom, so the mean of 200 has a relative error of 3.3 %.
    assert sum(result["kl"] for result in results) / 200 == pytest.approx(results[0]["kl_floor"], rel=0.12)


def of_pairs(samples):
    return joint_metrics(samples, target_distribution("two_token_deterministic"))


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (target_distribution, ("d3",), "`name` must be one of .* got 'd3'"),
        (target_distribution, ("two_token_correlated",), r"`correlation` must be a number in \[0, 1\].* got None"),
        (target_distribution, ("two_token_correlated", 1.5), r"`correlation` must be a number in \[0, 1\].* got 1.5"),
        (target_distribution, ("d1", 0.5), "`correlation` must be None .* got 0.5"),
        (synthetic_dataset, ("d1", 0, 0), "`num_rows` must be at least 1, got 0"),
        (of_pairs, (torch.zeros(3, 4, dtype=torch.long),), r"`samples` must have .*\(N, 2\).* got shape \(3, 4\)"),
        (of_pairs, (torch.zeros(0, 2, dtype=torch.long),), r"`samples` must have .*\(N, 2\).* got shape \(0, 2\)"),
        (of_pairs, (torch.zeros(3, dtype=torch.long),), r"`samples` must be an integer tensor .* shape \(3,\)"),
        (of_pairs, (torch.zeros(3, 2),), r"`samples` must be an integer tensor .* got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
