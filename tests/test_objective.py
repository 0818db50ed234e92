import math

import pytest
import torch
from helpers import normal, uniform
from torch.distributions import Normal, kl_divergence

from vmd_hf import VMDConfig
from vmd_hf.latents_vmd import draw_latents, gaussian_kl, log_density_ratio
from vmd_hf.objective_vmd import block_cross_entropy


@pytest.mark.parametrize("prior", [(), (normal(5, 3, seed=3), normal(5, 3, seed=4))])
def test_gaussian_kl_and_the_density_ratio_of_draws_are_those_of_torch_distributions(prior):
    mean, log_variance, epsilon = 2 * normal(5, 3, seed=1), 2 * normal(5, 3, seed=2), normal(5, 3, seed=5)
    q = Normal(mean.double(), (0.5 * log_variance.double()).exp())
    prior_mean, prior_log_variance = prior or (torch.zeros(5, 3), torch.zeros(5, 3))
    p = Normal(prior_mean.double(), (0.5 * prior_log_variance.double()).exp())
    kl = gaussian_kl(mean, log_variance, *prior).double()
    torch.testing.assert_close(kl, kl_divergence(q, p), rtol=1e-5, atol=1e-6)
    latents = draw_latents(mean, log_variance, epsilon)
    log_ratio = log_density_ratio(latents, log_variance, epsilon, *prior)
    z = q.mean + q.stddev * epsilon
    torch.testing.assert_close(latents.double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_ratio.double(), p.log_prob(z) - q.log_prob(z), rtol=1e-4, atol=1e-4)


class States:
    """A model whose logits are its hidden states."""

    config = VMDConfig(vocab_size=64)

    def compute_logits(self, hidden_states):
        return hidden_states


def test_block_cross_entropy_is_the_loop_over_tokens():
    logits, x_0 = 3 * normal(2, 6, 5), (5 * uniform(2, 3, 2)).long()  # two rows of three blocks of two tokens
    scored = torch.tensor([[[1, 0], [1, 1], [0, 0]], [[0, 0], [0, 1], [1, 1]]]).bool()
    logits[0, 0, (x_0[0, 0, 0] + 1) % 5] = -math.inf  # a forbidden token has no part in the sum
    result = block_cross_entropy(States(), logits, x_0, scored)
    expected = torch.zeros(2, 3, dtype=torch.double)
    for row, block, token in scored.nonzero().tolist():
        scores = logits[row, 2 * block + token].double().exp()
        expected[row, block] -= (scores[x_0[row, block, token]] / scores.sum()).log()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    logits[0, 0, x_0[0, 0, 0]] = -math.inf
    assert block_cross_entropy(States(), logits, x_0, scored)[0, 0] == math.inf


def test_block_cross_entropy_of_no_token_is_zero_and_has_a_gradient():
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    result = block_cross_entropy(States(), logits, torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).bool())
    assert result.tolist() == [[0, 0]]
    result.sum().backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    # Against float64 on the same rounded inputs: 1e-5 is out of reach of 8 or 11 bits of mantissa.
    mean, log_variance = normal(64, seed=3).to(dtype), normal(64, seed=4).to(dtype)
    exact = 0.5 * (mean.double() ** 2 + log_variance.double().exp() - 1 - log_variance.double())
    kl = gaussian_kl(mean, log_variance)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)

    logits, targets = (4 * normal(1, 64, 7, seed=5)).to(dtype), (7 * uniform(1, 1, 64)).long()
    exact = -logits.double().log_softmax(-1).gather(-1, targets[0, ..., None]).sum()
    loss = block_cross_entropy(States(), logits, targets, torch.ones(1, 1, 64).bool())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact[None, None], rtol=1e-5, atol=0)
