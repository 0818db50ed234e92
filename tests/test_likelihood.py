"""The references of this file enumerate the orders of revealing, integrate over z by Gauss-Hermite quadrature, and
call nothing of the library but the plain forward pass without labels and the latent encoder."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import MASK, PAD, digits, normal, pad_row, posterior_of_row, randomise, tiny_config, tiny_model, uniform
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.likelihood import corpus_bound, nelbo
from vmd_hf.noise_vmd import stratified_uniform

BOUNDS = ("per_sample", "per_step")
SIZES = {  # floor(k n / T) tokens after step k, worked out by hand
    (1, 1): [1],
    (1, 2): [1],
    (1, 3): [1],
    (2, 1): [2],
    (2, 2): [1, 1],
    (2, 3): [1, 1],
    (3, 1): [3],
    (3, 2): [1, 2],
    (3, 3): [1, 1, 1],
}
DIGITS = 3


def toy_model(seed=0, **overrides):
    """Three digits and a mask; one layer of 16; a posterior that is neither good nor the prior, and that is told of
    single steps, as `per_step` trains it."""
    settings = {
        "vocab_size": DIGITS + 1,
        "mask_token_id": DIGITS,
        "pad_token_id": None,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "position_embedding_type": "learned",
        "latent_size": 1,
        "objective": "per_step",
    }
    model = randomise(VMDForMaskedDiffusion(tiny_config(**(settings | overrides))), std=0.4, seed=seed).eval()
    with torch.no_grad():
        if model.latent_encoder is not None:
            model.latent_encoder.out_proj.weight *= 0.5
        if model.model.latent_prior is not None:
            model.model.latent_prior.out_proj.weight *= 0.5
    return model


def row_of(*tokens):
    return torch.tensor(tokens)


def assert_within_errors(values, expected, num_errors=4.5):
    """The mean of independent `values` (draws,) is `expected`, but for chance."""
    values = values.double()
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < num_errors * error + 1e-4, (values.mean(), error, expected)


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------


NUM_NODES = {1: 40, 2: 20, 3: 10}  # of a latent of that size, for each dimension


def quadrature(latent_size, num_nodes):
    """Nodes (nodes^latent_size, latent_size) and weights of the expectation under N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()
    grid = torch.tensor(list(itertools.product(nodes, repeat=latent_size)), dtype=torch.float32)
    products = torch.tensor([math.prod(pair) for pair in itertools.product(weights, repeat=latent_size)])
    return grid.view(len(products), latent_size), products.double()


def steps_of(order, num_steps):
    """(masked before the step, revealed by it) for each step that reveals in this order."""
    steps, start = [], 0
    for size in SIZES[len(order), num_steps]:
        steps.append((list(order[start:]), list(order[start : start + size])))
        start += size
    return steps


@torch.no_grad()
def log_likelihood(model, row, masked, revealed, z):
    """log p(revealed tokens | x^(k), z) for each of `z` (nodes, latent_size), in float64. With blocks, the row ends
    with the block in question, whose latent z is."""
    x_t = row.clone()
    x_t[masked] = model.config.mask_token_id
    latents = z if model.config.latent_size else None
    if latents is not None and model.config.block_size is not None:
        num_blocks = -(-len(row) // model.config.block_size)
        latents = torch.cat([torch.zeros(len(z), num_blocks - 1, z.shape[-1]), z[:, None]], dim=1)
    logits = model(x_t.expand(len(z), -1), latents=latents).logits.double()
    return logits.log_softmax(-1)[:, revealed, row[revealed]].sum(-1)


def sampler_log_probability(model, row, positions, num_steps, kept, prior=(0.0, 0.0)):
    """Exact log p(row at `positions` | its other tokens) of the sampler: one z kept, or a fresh one for each step,
    from a prior of that mean and log-variance."""
    z, weights = quadrature(model.config.latent_size, NUM_NODES[model.config.latent_size])
    z = prior[0] + math.exp(0.5 * prior[1]) * z
    probabilities = []
    for order in itertools.permutations(positions):
        steps = [log_likelihood(model, row, *step, z) for step in steps_of(order, num_steps)]
        if kept:
            probabilities.append(weights @ sum(steps).exp())
        else:
            probabilities.append(math.prod(weights @ step.exp() for step in steps))
    return math.log(sum(probabilities) / len(probabilities))


def expected_bound(model, row, positions, num_steps, bound, num_samples, posterior, prior=(0.0, 0.0)):
    """Expectation of the bound with one or two samples, or infinitely many, over all orders and latents.

    `posterior(masked, revealed)` gives mean and log-variance. Of a latent of size 1 the importance weights are
    integrated over; the KL is not used.
    """
    epsilon, weights = quadrature(model.config.latent_size, NUM_NODES[model.config.latent_size])
    total, orders = 0.0, list(itertools.permutations(positions))
    for order in orders:
        steps = steps_of(order, num_steps)
        groups = [(list(order), list(order), steps)] if bound == "per_sample" else [(*step, [step]) for step in steps]
        for masked, revealed, steps_of_group in groups:
            if num_samples == math.inf:
                z = prior[0] + math.exp(0.5 * prior[1]) * epsilon
                joint = sum(log_likelihood(model, row, *step, z) for step in steps_of_group)
                total -= math.log(weights @ joint.exp())
                continue
            mean, log_variance = posterior(masked, revealed)
            z = mean + (0.5 * log_variance).exp() * epsilon
            joint = sum(log_likelihood(model, row, *step, z) for step in steps_of_group)
            log_prior = -0.5 * ((z - prior[0]) ** 2 / math.exp(prior[1]) + prior[1])
            log_posterior = -0.5 * (epsilon**2 + log_variance)
            log_weights = joint + (log_prior - log_posterior).sum(-1).double()
            if num_samples == 1:
                total -= weights @ log_weights
            else:
                pairs = torch.logaddexp(log_weights[:, None], log_weights[None]) - math.log(2)
                total -= weights @ pairs @ weights
    return float(total) / len(orders)


def posterior_for(model, row):
    @torch.no_grad()
    def posterior(masked, revealed):
        return posterior_of_row(model, row, masked, revealed)

    return posterior


# ---------------------------------------------------------------------------------------------------------------------
# Bounds on the exact log-probability of the sampler
# ---------------------------------------------------------------------------------------------------------------------


TEXTS = [row_of(*tokens) for tokens in itertools.product(range(DIGITS), repeat=3)]


def assert_the_sampler_draws_from(exact, model, **settings):
    """20,000 texts of `generate` against the 27 enumerated probabilities of `TEXTS`, which sum to 1."""
    torch.manual_seed(0)
    num_texts = 20_000
    masks = torch.full((num_texts, 3), DIGITS)
    texts = model.generate(masks, do_sample=True, remasking="random", **settings)
    counts = torch.bincount(texts @ row_of(9, 3, 1), minlength=27)
    assert exact.sum().item() == pytest.approx(1, abs=1e-4)
    chi_square = ((counts - num_texts * exact) ** 2 / (num_texts * exact)).sum()
    assert chi_square < 54  # 26 degrees of freedom: exceeded by chance once in a thousand


@pytest.mark.parametrize("num_steps, resample_latents", [(2, False), (2, True), (3, True)])
def test_the_reference_is_the_distribution_of_the_sampler(num_steps, resample_latents):
    model = toy_model()
    exact = [sampler_log_probability(model, row, range(3), num_steps, not resample_latents) for row in TEXTS]
    settings = {"num_steps": num_steps, "resample_latents": resample_latents}
    assert_the_sampler_draws_from(torch.tensor(exact).exp(), model, **settings)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"latent_size": 1},
        {"latent_size": 2},
        {"latent_size": 3, "latent_input": "position_slices", "max_position_embeddings": 3},
    ],
)
def test_bounds_lie_above_the_exact_value_and_tighten_with_the_samples(settings, num_steps, bound):
    """For several tokens a step, in several steps, the orders are averaged inside the probability but outside the
    bound's logarithm, so that a gap remains however many samples are drawn; in one step none does."""
    model, row = toy_model(**settings), row_of(0, 2, 1)
    exact = -sampler_log_probability(model, row, range(3), num_steps, kept=bound == "per_sample")
    arguments = model, row, range(3), num_steps, bound
    elbo = expected_bound(*arguments, 1, posterior_for(model, row))
    limit = expected_bound(*arguments, math.inf, None)
    assert limit == pytest.approx(exact, abs=2e-3) if num_steps == 1 else limit > exact

    settings = {"bound": bound, "num_steps": num_steps, "batch_size": 4096}
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for num_samples, num_draws in ((1, 3000), (8, 1000), (64, 250)):
        output = nelbo(model, row.expand(num_draws, -1), num_samples=num_samples, generator=generator, **settings)
        means.append(output.nelbo.double().mean().item())
        errors.append(output.nelbo.double().std().item() / num_draws**0.5)
    assert means[0] == pytest.approx(elbo, abs=4.5 * errors[0])
    assert elbo > means[1] + 4.5 * errors[1]  # the samples help
    assert means[1] > means[2] - 3 * errors[1]
    assert means[2] > limit - 4.5 * errors[2]
    assert means[2] - limit < 0.3 * (elbo - limit)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_two_samples_are_the_double_integral(num_steps, bound):
    model, row = toy_model(seed=1), row_of(1, 2, 0)
    expected = expected_bound(model, row, range(3), num_steps, bound, 2, posterior_for(model, row))
    output = nelbo(model, row.expand(3000, -1), bound=bound, num_steps=num_steps, num_samples=2, batch_size=4096)
    assert_within_errors(output.nelbo, expected)
    assert output.reconstruction is None
    assert output.kl is None


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_parts_add_up_and_the_kl_is_in_closed_form(bound):
    model, row = toy_model(latent_size=2), row_of(2, 0, 1)
    output = nelbo(model, row[None], bound=bound, num_steps=1, num_orders=3)
    mean, log_variance = posterior_for(model, row)([0, 1, 2], [0, 1, 2])
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
    assert kl > 0.05
    torch.testing.assert_close(output.kl, kl[None])
    torch.testing.assert_close(output.nelbo, output.reconstruction + output.kl)
    assert output.num_tokens.tolist() == [3]


# ---------------------------------------------------------------------------------------------------------------------
# Without a latent
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 3, 7])
def test_without_a_latent_the_expectation_is_the_enumeration_of_orders(num_steps):
    model, row = toy_model(latent_size=0), row_of(0, 2, 1)
    orders = list(itertools.permutations(range(3)))
    values = [
        -sum(
            log_likelihood(model, row, *step, torch.zeros(1, 0)).item() for step in steps_of(order, min(num_steps, 3))
        )
        for order in orders
    ]
    assert max(values) - min(values) > 0.1
    output = nelbo(model, row.expand(600, -1), num_steps=num_steps)
    assert_within_errors(output.nelbo, sum(values) / 6)
    distances = (output.nelbo[:, None] - torch.tensor(values)).abs()
    assert distances.min(-1).values.max() < 1e-5  # every draw is one of them
    assert len(distances.argmin(-1).unique()) == len({round(value, 4) for value in values})  # and all occur


def spy_on_passes(model):
    """The list to which every pass appends its number of masks and of computed logits, for a single row."""
    seen = []
    model.model.register_forward_pre_hook(lambda module, args: seen.append([(args[0] == MASK).sum().item(), 0]))
    compute_logits = model.compute_logits

    def record(hidden_states):
        seen[-1][1] += hidden_states.shape[:-1].numel()
        return compute_logits(hidden_states)

    model.compute_logits = record
    return seen


@pytest.mark.parametrize(
    "length, num_steps, expected",
    [
        (3, 1, [[3, 3]]),
        (3, 2, [[3, 1], [2, 2]]),
        (3, 9, [[3, 1], [2, 1], [1, 1]]),
        (7, 3, [[7, 2], [5, 2], [3, 3]]),  # floor(7/3) = 2, floor(14/3) = 4, 7
    ],
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_steps_are_those_of_the_sampler(length, num_steps, expected, bound):
    """Masks before each step and logits in it; the sampler's passes see the same numbers of masks."""
    model, row = tiny_model(), digits(1, length)
    seen = spy_on_passes(model)
    nelbo(model, row, bound=bound, num_steps=num_steps)
    assert seen == expected
    seen.clear()
    model.generate(torch.full_like(row, MASK), num_steps=num_steps)
    assert [masks for masks, _ in seen] == [masks for masks, _ in expected]


# ---------------------------------------------------------------------------------------------------------------------
# What is no bound
# ---------------------------------------------------------------------------------------------------------------------


class CodeOfPair(nn.Module):
    """Posterior of a pair (k, k): z = +1 or -1 by k where both tokens are masked, the prior where one gives the other
    away."""

    def forward(self, clean_embeddings, masked, revealed, position_ids, attention_context, before=None, prior=()):
        sign = clean_embeddings[:, 0, :1] - clean_embeddings[:, 0, 1:2]  # embeddings are one-hot
        joint = (revealed.sum(-1, keepdim=True) == 2).float()
        return joint * sign, joint * math.log(0.4)


def perfect_pair():
    """A model by hand of the pairs 00 and 11, each of probability 1/2: the first token revealed tells the other, and
    while both are masked z says which (logits +- 2.5 z)."""
    model = VMDForMaskedDiffusion(
        tiny_config(
            vocab_size=3,
            mask_token_id=2,
            pad_token_id=None,
            hidden_size=4,
            num_attention_heads=1,
            latent_size=1,
            position_embedding_type="rotary",  # so that embeddings are those of the tokens alone
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(4)[:3])
        model.model.embeddings.embed_tokens.weight.copy_(torch.eye(4)[:3])
    model.latent_encoder = CodeOfPair()

    def hidden_states_of_pair(input_ids, layout, conditioning, *args, **kwargs):
        """They are the logits."""
        masked = (input_ids == 2)[..., None]
        from_z = 2.5 * torch.cat([conditioning, -conditioning], dim=-1)  # (batch, 1, 2)
        from_other = 60 * torch.stack([input_ids == 0, input_ids == 1], dim=-1).flip(1).float()
        logits = torch.where(masked.all(1, keepdim=True), from_z, from_other)
        return BaseModelOutput(last_hidden_state=nn.functional.pad(logits, (0, 2)))

    model.model.condition = lambda latents: latents
    model.model.forward = hidden_states_of_pair
    return model


def test_the_objective_of_the_paper_can_fall_below_the_entropy_and_the_bounds_cannot():
    """The 1/t weight turns the joint cost f(k) of k masked tokens into a sum of f(k)/k. In a pair that determines each
    other f(1) = 0, so that the objective is f(2)/2, while the entropy is log 2 = 0.693 nats and f(2) = R + KL:

        R = 2 E[log(1 + exp(-5 z))] with z ~ N(1, 0.4),    KL = (1 + 0.4 - 1 - log 0.4) / 2 = 0.658

    At T = 1 either bound is f(2). At T = 2 they are R/2 + KL: the first token needs z, the second one does not.
    """
    model = perfect_pair()
    rows = row_of(0, 1)[torch.arange(20_000) % 2][:, None].expand(-1, 2)
    epsilon, weights = quadrature(1, 100)
    reconstruction = 2 * float(weights @ torch.log1p(torch.exp(-5 * (1 + 0.4**0.5 * epsilon[:, 0].double()))))
    kl = (1 + 0.4 - 1 - math.log(0.4)) / 2

    # Two tokens a row, over which the loss is averaged. Times from 0.001 on: the rest of the integral is 0.001 f(2).
    noise = {"position_noise": uniform(20_000, 2), "latent_noise": normal(20_000, 1)}
    times = 1e-3 + (1 - 1e-3) * stratified_uniform(20_000, "cpu")
    objective = 2 * model(input_ids=rows, labels=rows, times=times, **noise).loss
    assert objective.item() == pytest.approx((reconstruction + kl) / 2, abs=0.02)
    assert objective < math.log(2) - 0.2

    for bound in BOUNDS:
        assert_within_errors(nelbo(model, rows, bound=bound).nelbo, reconstruction + kl)
        assert_within_errors(nelbo(model, rows, bound=bound, num_steps=2).nelbo, reconstruction / 2 + kl)
    assert reconstruction / 2 + kl > math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def blocks_and_before(model, row):
    """Each block with the last clean hidden state before it, (1, hidden), zeros before the first."""
    layout = model.model.lay_out(row[None])
    hidden_states, _ = model.model.read(layout.scatter(row[None], 0), layout)
    size = model.config.block_size
    blocks = [range(start, min(start + size, len(row))) for start in range(0, len(row), size)]
    nothing = torch.zeros(1, model.config.hidden_size)
    return [(block, hidden_states[:, block.start - 1] if block.start else nothing) for block in blocks]


def prior_of_block(model, before):
    """Mean and log-variance of a latent of size 1."""
    if model.model.latent_prior is None:
        return 0.0, 0.0
    return [value.item() for value in model.model.latent_prior(before)]


def sampler_over_blocks(model, row, num_steps, kept):
    """Exact log-probability of the row: the sum of its blocks', each given the clean ones before it."""
    return sum(
        sampler_log_probability(model, row[: block.stop], block, num_steps, kept, prior_of_block(model, before))
        for block, before in blocks_and_before(model, row)
    )


def expected_over_blocks(model, row, labelled, num_steps, bound, num_samples):
    """Sum of the expected bounds of the row's blocks, each given the clean ones before it."""
    total = 0.0
    for block, before in blocks_and_before(model, row):
        positions = [position for position in block if position in labelled]
        if not positions:
            continue
        until = row[: block.stop]

        @torch.no_grad()
        def posterior(masked, revealed, block=block, before=before):
            flags = torch.zeros(2, len(row), dtype=torch.bool)
            flags[0, masked] = True
            flags[1, revealed] = True
            flags, columns = flags[:, block.start : block.stop, None], torch.tensor(block)[None]
            embeddings = model.model.embeddings(row[columns], columns)
            context = model.model.attention_context(embeddings, None, columns)
            return model.latent_encoder(embeddings, flags[0].T, flags[1].T, columns, context, before)

        prior = prior_of_block(model, before)
        assert model.model.latent_prior is None or abs(prior[0]) > 0.05
        total += expected_bound(model, until, positions, num_steps, bound, num_samples, posterior, prior)
    return total


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("prior", ["standard", "learned"])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_bound_of_a_row_is_the_sum_over_its_blocks(num_samples, prior, bound):
    """Blocks of 3, 3 and 1, of which 2, 3 and 1 tokens are scored: each has its own latent, steps and order."""
    model, row = toy_model(seed=4, block_size=3, prior=prior), row_of(0, 2, 1, 1, 0, 2, 2)
    model.latent_encoder.out_proj.weight.data *= 0.2  # importance weights of little spread
    labels = row.clone()
    labels[1] = -100
    labelled = [0, 2, 3, 4, 5, 6]
    for num_steps in (1, 2):
        expected = expected_over_blocks(model, row, labelled, num_steps, bound, num_samples)
        output = nelbo(
            model,
            row.expand(1500, -1),
            labels=labels.expand(1500, -1),
            bound=bound,
            num_steps=num_steps,
            num_samples=num_samples,
        )
        assert_within_errors(output.nelbo, expected)
        assert output.num_tokens.eq(6).all()


@pytest.mark.parametrize("kept", [True, False])
def test_with_blocks_and_a_learned_prior_the_sampler_is_the_reference_and_bounds_lie_above_it(kept):
    """Blocks of two tokens and of one; the prior's means and variances are far from those of N(0, I)."""
    model = toy_model(seed=4, block_size=2, prior="learned")
    model.model.latent_prior.out_proj.bias.data = torch.tensor([0.8, -1.0])
    exact = torch.tensor([sampler_over_blocks(model, row, 2, kept) for row in TEXTS])
    assert_the_sampler_draws_from(exact.exp(), model, num_steps=2, resample_latents=not kept)

    bound = "per_sample" if kept else "per_step"
    for row, log_probability in zip(TEXTS, exact, strict=True):
        elbo = expected_over_blocks(model, row, range(3), 2, bound, 1)
        assert elbo > expected_over_blocks(model, row, range(3), 2, bound, 2) > -log_probability


def test_clean_tokens_are_read_once():
    model, rows = tiny_model(block_size=2), digits(2, 6)
    passes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs.get("clean", False)), with_kwargs=True
    )
    nelbo(model, rows, num_steps=2, num_samples=2, num_orders=2, bound="per_step", batch_size=4)
    assert passes == [True] + [False] * 4  # 2 rows x 2 steps x 2 samples x 2 orders in passes of 4


@pytest.mark.parametrize("bound", BOUNDS)
def test_documents_of_a_packed_row_are_rows_of_their_own(bound):
    """A generator gives the tokens of two documents the same numbers, whether in a row of each or in one."""
    model, documents = tiny_model(block_size=2), [digits(1, 3, seed=1)[0], digits(1, 4, seed=2)[0]]
    settings = {"bound": bound, "num_steps": 2, "num_samples": 2}
    apart = nelbo(
        model,
        torch.cat([pad_row(document, 4, "right", PAD) for document in documents]),
        attention_mask=row_of([1, 1, 1, 0], [1, 1, 1, 1]),
        **settings,
        generator=torch.Generator().manual_seed(0),
    )
    packed = nelbo(
        model,
        torch.cat(documents)[None],
        position_ids=row_of([0, 1, 2, 0, 1, 2, 3]),
        **settings,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(packed.nelbo, apart.nelbo.sum(0, keepdim=True), rtol=1e-4, atol=1e-4)
    assert packed.num_tokens.tolist() == [7]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, padding, batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_prompt_is_given_and_not_scored(bound):
    model, row, scored = toy_model(seed=2), row_of(1, 0, 2, 2), [0, 2, 3]
    labels = row.clone()
    labels[1] = -100
    expected = expected_bound(model, row, scored, 2, bound, 1, posterior_for(model, row))
    output = nelbo(model, row.expand(2000, -1), labels=labels.expand(2000, -1), bound=bound, num_steps=2)
    assert_within_errors(output.nelbo, expected)
    assert output.num_tokens.eq(3).all()


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_result_does_not_depend_on_the_batch_size(bound, block_size):
    model, rows = tiny_model(block_size=block_size), digits(3, 5)
    settings = {"bound": bound, "num_steps": 3, "num_samples": 4, "num_orders": 3}
    sizes = []
    model.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    expected = nelbo(model, rows, **settings, generator=torch.Generator().manual_seed(0), batch_size=10_000).nelbo
    for batch_size in (1, 3, 10, None):
        sizes.clear()
        output = nelbo(model, rows, **settings, generator=torch.Generator().manual_seed(0), batch_size=batch_size)
        torch.testing.assert_close(output.nelbo, expected, rtol=1e-4, atol=1e-4)
        assert max(sizes[1:]) <= (batch_size or 3)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_standard_error_is_the_spread_over_repeats(num_samples):
    model, row = toy_model(), row_of(0, 2, 1)
    output = nelbo(model, row.expand(800, -1), num_steps=2, num_samples=num_samples, num_orders=6, batch_size=4096)
    spread = output.nelbo.std()
    assert output.standard_error.square().mean().sqrt().item() == pytest.approx(spread.item(), rel=0.1)
    single = nelbo(model, row[None], num_steps=2)
    assert single.standard_error.isnan().all()


def test_unknown_draws_have_an_error_only_where_something_is_drawn():
    model, rows = tiny_model(latent_size=0), digits(2, 3)
    labels = rows.clone()
    labels[0, :2] = -100  # a single token has one order
    assert nelbo(model, rows, labels=labels, num_steps=2).standard_error.isnan().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Training and adapters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("blocks", [{}, {"block_size": 3, "prior": "learned"}])
def test_the_few_step_objectives_train_the_bound(blocks, bound, num_steps):
    """Their loss on one row, averaged over steps, orders and latents, is the bound over the number of tokens."""
    model, row = toy_model(objective=bound, objective_steps=[num_steps], **blocks), row_of(0, 2, 1, 1)
    rows = row.expand(64, -1)
    output = nelbo(model, rows, bound=bound, num_steps=num_steps, num_orders=8, batch_size=1024)
    model.train()
    with torch.no_grad():
        losses = 4 * torch.stack([model(input_ids=rows, labels=rows).loss for _ in range(30)])
    error = (losses.var() / len(losses) + output.nelbo.var() / len(rows)).sqrt().item()
    assert losses.mean().item() == pytest.approx(output.nelbo.mean().item(), abs=4.5 * error)
    assert error < 0.2


def test_the_posterior_is_the_one_that_the_objective_has_trained():
    """Only that of `per_step` has been told which tokens stay masked; it is another matter that any gives a bound."""
    row = row_of(0, 2, 1)
    for objective in ("vmd", "per_sample", "per_step"):
        model = toy_model(objective=objective)
        literal = posterior_for(model, row)
        trained = {
            "vmd": lambda masked, revealed, literal=literal: literal(masked, masked),
            "per_sample": lambda masked, revealed, literal=literal: literal([0, 1, 2], [0, 1, 2]),
            "per_step": literal,
        }[objective]
        expected = expected_bound(model, row, range(3), 2, "per_step", 1, trained)
        output = nelbo(model, row.expand(2000, -1), bound="per_step", num_steps=2)
        assert_within_errors(output.nelbo, expected)


def test_the_model_is_left_as_it_was():
    model, rows = tiny_model(hidden_dropout=0.5, attention_dropout=0.5).train(), digits(2, 4)
    model.model.layers[0].eval()  # a frozen part
    before = {name: module.training for name, module in model.named_modules()}
    values = [nelbo(model, rows, generator=torch.Generator().manual_seed(0)).nelbo for _ in range(2)]
    assert torch.equal(*values)  # no dropout
    assert not values[0].requires_grad
    with pytest.raises(ValueError):
        nelbo(model, rows, labels=rows + 1)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.latent_encoder.kl_warmup_progress == 0


def test_half_precision_models_are_scored_in_float32():
    model, rows = tiny_model(), digits(3, 4)
    settings = {"num_steps": 2, "num_samples": 2}
    expected = nelbo(model, rows, **settings, generator=torch.Generator().manual_seed(0)).nelbo
    actual = nelbo(model.bfloat16(), rows, **settings, generator=torch.Generator().manual_seed(0)).nelbo
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Corpora
# ---------------------------------------------------------------------------------------------------------------------


def test_bits_of_a_corpus_are_a_ratio_of_sums():
    """Over rows of equal length it is a mean, and its error that of a mean; batches and their sizes do not matter."""
    model, rows = tiny_model(latent_size=0), digits(10, 4)
    bits = nelbo(model, rows).nelbo / 4 / math.log(2)
    for split in (10, 3, 1):
        result = corpus_bound(model, [{"input_ids": part, "unused": 3} for part in rows.split(split)])
        assert result.bits_per_token == pytest.approx(bits.mean().item(), rel=1e-5)
        assert result.standard_error == pytest.approx(bits.std().item() / 10**0.5, rel=1e-4)
        assert (result.num_rows, result.num_tokens) == (10, 40)
        low, high = result.interval
        assert (low + high) / 2 == pytest.approx(result.bits_per_token)
        assert high - low == pytest.approx(2 * 1.96 * result.standard_error)


def test_a_difference_of_bounds_is_paired_over_rows():
    model, other, rows = tiny_model(latent_size=0), tiny_model(latent_size=0), digits(10, 4)
    nn.init.normal_(other.lm_head.weight)
    labels = rows.masked_fill(torch.arange(4) >= torch.arange(10)[:, None] % 4 + 1, -100)  # 1 to 4 scored tokens
    batches, counts = [{"input_ids": rows, "labels": labels}], labels.ne(-100).sum(-1)
    bits = [nelbo(one, rows, labels=labels).nelbo / math.log(2) for one in (model, other)]
    bounds = [corpus_bound(one, batches) for one in (model, other)]
    difference, error = bounds[0].difference(bounds[1])
    assert difference == pytest.approx(bounds[0].bits_per_token - bounds[1].bits_per_token, rel=1e-4)
    residuals = bits[0] - bits[1] - difference * counts
    assert error == pytest.approx((residuals.square().sum() / 9 * 10).sqrt().item() / counts.sum().item(), rel=1e-3)
    with pytest.raises(
        ValueError, match="other must be a bound of the same rows in the same order, got 10 of 40 tokens, not 10 of 23"
    ):
        bounds[0].difference(corpus_bound(other, [{"input_ids": rows}]))


def test_the_error_of_a_corpus_with_rows_of_many_lengths_is_that_of_the_jackknife():
    model, rows = tiny_model(latent_size=0), digits(60, 8)
    labels = rows.masked_fill(torch.arange(8) >= torch.arange(60)[:, None] % 9, -100)  # 0 to 8 scored tokens
    nats, counts = nelbo(model, rows, labels=labels).nelbo[labels[:, 0] != -100], labels.ne(-100).sum(-1)
    counts = counts[counts > 0]
    leave_one_out = (nats.sum() - nats) / (counts.sum() - counts) / math.log(2)
    jackknife = ((leave_one_out - leave_one_out.mean()) ** 2).sum() * (len(nats) - 1) / len(nats)
    result = corpus_bound(model, [{"input_ids": rows, "labels": labels}])
    assert result.bits_per_token == pytest.approx((nats.sum() / counts.sum()).item() / math.log(2), rel=1e-5)
    assert result.standard_error == pytest.approx(jackknife.sqrt().item(), rel=0.05)
    assert (result.num_rows, result.num_tokens) == (len(nats), counts.sum())


def test_one_row_has_no_interval_and_no_tokens_are_an_error():
    model, rows = tiny_model(), digits(1, 4)
    assert math.isnan(corpus_bound(model, [{"input_ids": rows}]).interval[0])
    for batches in ([], [{"input_ids": rows, "labels": torch.full_like(rows, -100)}]):
        with pytest.raises(ValueError, match="at least one scored token"):
            corpus_bound(model, batches)


def test_progress_is_shown_on_request_only(capsys):
    model, rows = tiny_model(), digits(2, 3)
    nelbo(model, rows)
    corpus_bound(model, [{"input_ids": rows}])
    assert capsys.readouterr().err == ""
    nelbo(model, rows, num_steps=3, show_progress=True)
    assert "3/3" in capsys.readouterr().err
    corpus_bound(model, [{"input_ids": rows}] * 2, show_progress=True)
    assert "2/2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bound": "vmd"}, "bound must be one of .*per_sample.*per_step.*got 'vmd'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_orders": -1}, "num_orders must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"generator": [torch.Generator()]}, "generator must hold one for each of 2 rows, got 1"),
        ({"labels": (digits(2, 3) + 1) % 10}, "labels must equal input_ids"),
        ({"labels": digits(2, 2)}, r"labels must have shape \(2, 3\), got \(2, 2\)"),
        (
            {"labels": digits(2, 3), "attention_mask": torch.zeros(2, 3)},
            "labels must be -100 where attention_mask is 0",
        ),
        ({"input_ids": torch.full((2, 3), MASK)}, "must not hold the mask token"),
        ({"input_ids": torch.full((2, 3), PAD)}, "must not hold the mask token or the pad token"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids must have shape \(batch, length\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask.*\(2, 3\), got \(2, 4\)"),
    ],
)
@pytest.mark.parametrize("block_size", [None, 2])
def test_wrong_arguments_are_errors(block_size, arguments, message):
    model = tiny_model(block_size=block_size)
    with pytest.raises(ValueError, match=message):
        nelbo(model, **({"input_ids": digits(2, 3)} | arguments))


def test_a_model_without_a_mask_token_is_an_error():
    with pytest.raises(ValueError, match="mask_token_id must be set"):
        nelbo(tiny_model(mask_token_id=None), digits(2, 3))
