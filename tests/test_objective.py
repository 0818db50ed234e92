import math

import pytest
import torch
from helpers import normal, uniform
from torch.distributions import Normal, kl_divergence

from vmd_hf.objective_vmd import gaussian_kl, row_cross_entropy


def test_gaussian_kl_is_that_of_torch_distributions():
    mean, log_variance = 2 * normal(5, 3, seed=1), 2 * normal(5, 3, seed=2)
    posterior = Normal(mean.double(), (0.5 * log_variance.double()).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros(5, 3).double(), torch.ones(5, 3).double()))
    torch.testing.assert_close(gaussian_kl(mean, log_variance).double(), expected, rtol=1e-5, atol=1e-6)


def test_gaussian_kl_on_paper():
    assert gaussian_kl(torch.zeros(2, 2), torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]  # the prior itself
    assert gaussian_kl(torch.tensor(3.0), torch.tensor(0.0)).item() == pytest.approx(4.5)  # mean^2 / 2
    # Variance e: (e - 1 - 1) / 2.
    assert gaussian_kl(torch.tensor(0.0), torch.tensor(1.0)).item() == pytest.approx((math.e - 2) / 2, rel=1e-6)


def test_row_cross_entropy_is_the_loop_over_tokens():
    logits, targets = 3 * normal(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    rows = torch.tensor([2, 0, 2, 2, 0, 4])  # in no order; rows 1 and 3 have no token
    expected = [0.0] * 5
    for token, (target, row) in enumerate(zip(targets.tolist(), rows.tolist(), strict=True)):
        scores = [math.exp(value) for value in logits[token].tolist()]
        expected[row] -= math.log(scores[target] / sum(scores))
    result = row_cross_entropy(logits, targets, rows, num_rows=5)
    assert result.shape == (5,)
    assert result.tolist() == pytest.approx(expected, rel=1e-5)
    assert result[1] == result[3] == 0


def test_row_cross_entropy_counts_a_forbidden_token_as_impossible():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    result = row_cross_entropy(logits, torch.tensor([0]), torch.tensor([0]), 1)
    assert result.item() == pytest.approx(math.log(2))
    assert row_cross_entropy(logits, torch.tensor([2]), torch.tensor([0]), 1).item() == math.inf


def test_row_cross_entropy_of_no_token_is_zero_and_has_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    no_token = torch.zeros(0, dtype=torch.long)
    result = row_cross_entropy(logits, no_token, no_token, num_rows=3)
    assert result.tolist() == [0, 0, 0]
    result.sum().backward()
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    # Against float64 on the same rounded inputs: 1e-5 is out of reach of 8 or 11 bits of mantissa.
    mean, log_variance = normal(64, seed=3).to(dtype), normal(64, seed=4).to(dtype)
    exact = 0.5 * (mean.double() ** 2 + log_variance.double().exp() - 1 - log_variance.double())
    kl = gaussian_kl(mean, log_variance)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)

    logits, targets = (4 * normal(64, 7, seed=5)).to(dtype), (7 * uniform(64)).long()
    exact = -logits.double().log_softmax(-1).gather(-1, targets[:, None]).sum()
    loss = row_cross_entropy(logits, targets, torch.zeros(64, dtype=torch.long), num_rows=1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact[None], rtol=1e-5, atol=0)
