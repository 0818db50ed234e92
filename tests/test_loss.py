"""The loss of whole sequences and of blocks: against a loop over rows and tokens, by enumeration, and what must not
change it."""

import copy
import itertools
import math

import pytest
import torch
from dense_reference import slow_loss
from helpers import (
    CLOSE,
    KINDS,
    MASK,
    OBJECTIVES,
    PAD,
    PER_POSITION,
    POSITIONS,
    SCALARS,
    assert_gradients_close,
    digits,
    every_kind,
    every_objective,
    gradients_of,
    loss_batch,
    noise_for,
    normal,
    of_the_same_weights,
    posterior_of_row,
    spy_on_noisy_inputs,
    tiny_config,
    tiny_model,
    uniform,
)

from vmd_hf import VMDForMaskedDiffusion, objective_vmd
from vmd_hf.checks_vmd import check_labels

OF_LATENTS = ("kl_per_latent", "posterior_shift")
shapes = pytest.mark.parametrize("block_size", [None, 3])
SLICES = {"latent_input": "position_slices"}


# ---------------------------------------------------------------------------------------------------------------------
# The loop over rows, blocks and tokens
# ---------------------------------------------------------------------------------------------------------------------


def assert_loss_is_the_loop(seed=0, training=False, **settings):
    settings = {"kl_weight": 0.7, "time_epsilon": 0.5} | settings  # given times may lie below it
    model = tiny_model(**settings).train(training)
    batch, noise = loss_batch(), noise_for(model, 6, 7, seed)
    with torch.no_grad():
        output = model(**batch, **noise)
        reconstruction, kl, kl_per_latent, shifts = slow_loss(model, **batch, **noise)
    assert reconstruction > 0 and (kl > 0) == (model.config.latent_size > 0)
    torch.testing.assert_close(output.reconstruction_loss, reconstruction, **CLOSE)
    torch.testing.assert_close(output.kl, kl, **CLOSE)
    torch.testing.assert_close(output.loss, reconstruction + 0.7 * kl, **CLOSE)
    if model.config.latent_size:
        torch.testing.assert_close(output.kl_per_latent, kl_per_latent, **CLOSE)
        torch.testing.assert_close(output.posterior_shift, shifts, **CLOSE)
    else:
        assert output.kl_per_latent is None and output.posterior_shift is None
    assert output.logits is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block_size", [None, 2, 3, 10])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_loop_over_rows_and_blocks_and_tokens(objective, block_size, training):
    for seed in (0, 100):
        settings = {"objective": objective, "objective_steps": [2, 1, 4], "block_size": block_size}
        assert_loss_is_the_loop(seed, training, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_size": 0},
        {"block_size": 3, "latent_size": 0},
        {"block_size": 3, "prior": "learned"},
        {"latent_input": "layers_and_positions"},
        {"block_size": 3, "latent_input": "layers_and_positions"},
        PER_POSITION,
        {"block_size": 3, "latent_size": 6, **SLICES},
        {"block_size": 3, "latent_size": 6, "prior": "learned", **SLICES},
    ],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_loop_for_all_kinds_of_latents(objective, settings):
    assert_loss_is_the_loop(objective=objective, objective_steps=[2, 1, 3], **settings)


@shapes
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["both", "rotary", "learned", "groups"])
def test_the_loss_is_the_loop_for_all_positions_and_attention_implementations(position, implementation, block_size):
    settings = POSITIONS[position] | {"num_latent_encoder_layers": 2, "attn_implementation": implementation}
    assert_loss_is_the_loop(block_size=block_size, **settings)


@shapes
@pytest.mark.parametrize(
    "settings",
    [{"num_loops": 2}, {"objective": "per_step", "objective_steps": [1, 2, 3], "latent_min_tokens": 2}],
)
def test_the_loss_is_the_loop_with_loops_of_layers_and_with_null_latents_beside_others(settings, block_size):
    """Some blocks of a batch reveal enough tokens for a latent, some do not."""
    assert_loss_is_the_loop(block_size=block_size, **settings)


@pytest.mark.parametrize("settings", [{}, {"block_size": 3}, {"block_size": 3, "prior": "learned"}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_that_of_the_loop(objective, settings):
    """Through z both mean and variance of the posterior learn, and so does the clean stream, both where it is attended
    to and where posterior and prior read it."""
    model = tiny_model(objective=objective, **settings).train()
    batch, noise = loss_batch(), noise_for(model, 6, 7)
    reconstruction, kl, *_ = slow_loss(model, **batch, **noise)
    output = model(**batch, **noise)
    assert not any(output[name].requires_grad for name in (*SCALARS[1:], *OF_LATENTS))
    assert_gradients_close(gradients_of(model, output.loss), gradients_of(model, reconstruction + kl))


@every_kind
def test_a_mask_of_ones_is_none(kind):
    model, input_ids = tiny_model(**KINDS[kind]), digits(3, 6)
    noise = noise_for(model, 3, 6)
    losses = [model(input_ids, mask, labels=input_ids, **noise).loss for mask in (None, torch.ones_like(input_ids))]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "per_sample", "objective_steps": [2]}, {"block_size": 3, "latent_size": 0}]
)
def test_with_a_loop_loss_earlier_loops_pay_as_models_of_so_many_loops(settings):
    """(With blocks and a latent z would differ: the posterior reads what all loops made of the clean context.)"""
    model = tiny_model(**settings, kl_weight=0.3, num_loops=3, loop_loss=True).train()
    input_ids = digits(2, 6)
    blocks = "block_size" in settings
    noise = {"times": uniform(2, 2) if blocks else uniform(2), "position_noise": uniform(2, 6)}
    if not blocks:
        noise["latent_noise"] = normal(2, 4)
    batch = {"input_ids": input_ids, "labels": input_ids} | noise
    trained = model(**batch)
    reported = [trained.reconstruction_loss, trained.kl]
    terms = []
    model.config.loop_loss = False
    for num_loops in (1, 2, 3):
        model.config.num_loops = num_loops
        terms.append(model(**batch).reconstruction_loss)
    assert len({round(term.item(), 3) for term in terms}) == 3
    torch.testing.assert_close(trained.loss, terms[2] + (terms[0] + terms[1]) / 2 + 0.3 * trained.kl)
    model.config.loop_loss = True
    evaluated = model.eval()(**batch)
    torch.testing.assert_close(reported, [evaluated.reconstruction_loss, evaluated.kl])
    torch.testing.assert_close(evaluated.loss, terms[2] + 0.3 * trained.kl)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has it since 2.13")
@pytest.mark.parametrize("settings", [{"block_size": 3}, {"tie_word_embeddings": False}])
def test_the_loss_of_many_logits_is_computed_in_parts(settings, monkeypatch):
    model, batch, noise = tiny_model(**settings), loss_batch(), {"noise_seeds": torch.arange(6)}
    with torch.no_grad():
        evaluated = model(**batch, **noise).loss
    whole = gradients_of(model, model.train()(**batch, **noise).loss)
    monkeypatch.setattr(objective_vmd, "LARGEST_LOGITS", 30)  # of two tokens and a half
    monkeypatch.setattr(model, "compute_logits", None)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch, **noise).loss, evaluated)
    assert_gradients_close(gradients_of(model, model.train()(**batch, **noise).loss), whole)

    monkeypatch.undo()
    monkeypatch.setattr(objective_vmd, "LARGEST_LOGITS", 30)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)  # such a head is called
    assert model.eval()(**batch, **noise).loss != evaluated


@every_objective
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind, objective):
    """Also with rows that are all context or padding in one of them, as the Trainer accumulates."""
    model, batch = tiny_model(objective=objective, kl_weight=0.1, **KINDS[kind]).train(), loss_batch(8)
    noise, num_items = noise_for(model, 8, 7), (batch["labels"] != -100).sum()
    whole = gradients_of(model, model(**batch, **noise).loss)
    parts = 0.0
    for start in range(0, 8, 2):
        part = {name: value[start : start + 2] for name, value in (batch | noise).items()}
        parts = parts + model(**part, num_items_in_batch=num_items).loss
    assert_gradients_close(gradients_of(model, parts), whole)


def test_the_kl_weight_warms_up_over_training_passes_and_goes_on_after_loading(tmp_path):
    model = tiny_model(kl_weight=2.0, kl_warmup_steps=4).train()
    batch, noise = loss_batch(), noise_for(model, 6, 7)

    def factor(model):
        output = model(**batch, **noise)
        return ((output.loss - output.reconstruction_loss) / output.kl).item()

    # kl_weight times the cube of the share of the warm-up that is done: 1/4, 2/4, 3/4, 1.
    assert [factor(model) for _ in range(2)] == pytest.approx([2 / 64, 2 * 8 / 64], rel=1e-4)
    model.eval()
    assert factor(model) == pytest.approx(2, rel=1e-4)  # evaluation has the full weight, and does not count
    model(digits(2, 3))
    with torch.no_grad():  # nor does a pass in training mode that is no step
        assert factor(model.train()) == pytest.approx(2 * 8 / 64, rel=1e-4)
    model.save_pretrained(tmp_path)
    assert model.state_dict()["latent_encoder.kl_warmup_progress"] == 2
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path).train()
    expected = [2 * 27 / 64, 2, 2, 2]
    assert [factor(loaded) for _ in range(4)] == pytest.approx(expected, rel=1e-4)
    assert [factor(model.train()) for _ in range(4)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"block_size": 3, "prior": "learned"}])
def test_huge_log_variances_have_a_finite_kl(settings, dtype):
    model, input_ids = tiny_model(**settings).to(dtype), digits(3, 6)
    for signs in (1, -1):
        with torch.no_grad():
            model.latent_encoder.out_proj.weight.zero_()
            model.latent_encoder.out_proj.bias[4:] = signs * 6e4
            if model.model.latent_prior is not None:
                model.model.latent_prior.out_proj.weight.zero_()
                model.model.latent_prior.out_proj.bias[4:] = -signs * 6e4
        output = model(input_ids, labels=input_ids, noise_seeds=torch.arange(3))
        assert output.kl.isfinite() and output.kl > 1
        if dtype == torch.float32:  # such a z is beyond what layers in float16 can take
            assert output.loss.isfinite()
            gradients_of(model, output.loss)


# ---------------------------------------------------------------------------------------------------------------------
# What costs nothing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_objective
def test_context_and_padding_cost_nothing(kind, objective, implementation):
    model = tiny_model(objective=objective, kl_warmup_steps=3, **KINDS[kind])
    model.set_attn_implementation(implementation)
    input_ids, mask = digits(2, 5), torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": torch.full_like(input_ids, -100)}
    for training, num_items in ((False, None), (True, None), (True, torch.tensor(0))):
        output = model.train(training)(**batch, num_items_in_batch=num_items)
        assert [output[name].item() for name in SCALARS] == [0, 0, 0]
        assert all(output[name].eq(0).all() for name in OF_LATENTS if name in output)
        gradients_of(model, output.loss)
    logits = model(input_ids, attention_mask=mask).logits
    assert logits[0, :4, :MASK].isfinite().all() and not logits.isnan().any()


@shapes
def test_a_row_or_block_of_which_nothing_is_masked_is_like_context(block_size):
    """Chance may leave it unmasked under `vmd`; the other objectives always reveal something."""
    model, input_ids = tiny_model(block_size=block_size).train(), digits(3, 6)
    noise = noise_for(model, 3, 6) | {"position_noise": torch.zeros(3, 6)}
    part, latent = (1, 1) if block_size is None else ((slice(None), slice(3, 6)), (slice(None), 1))
    noise["position_noise"][part] = 1
    unmasked = model(input_ids=input_ids, labels=input_ids, **noise, num_items_in_batch=18)
    labels = input_ids.clone()
    labels[part] = -100
    context = model(input_ids=input_ids, labels=labels, **noise, num_items_in_batch=18)
    for name in (*SCALARS, *OF_LATENTS):
        torch.testing.assert_close(unmasked[name], context[name])
    without = torch.zeros(noise["times"].shape, dtype=torch.bool)
    without[latent] = True
    assert torch.equal(unmasked.kl_per_latent == 0, without)
    assert torch.equal((unmasked.posterior_shift == 0).all(-1), without)
    gradients_of(model, unmasked.loss)
    nothing = model(input_ids=input_ids, labels=input_ids, **noise | {"position_noise": torch.ones(3, 6)})
    assert nothing.loss == 0 and nothing.kl == 0
    gradients_of(model, nothing.loss)


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------


@every_objective
def test_noise_is_that_of_the_row_in_evaluation_and_of_the_default_generator_in_training(kind, objective):
    model, input_ids = tiny_model(objective=objective, **KINDS[kind]), digits(6, 5)

    def output(seed):
        torch.manual_seed(seed)
        return model(input_ids=input_ids, labels=input_ids)

    first, second = output(1), output(99)
    for name in first:
        assert torch.equal(first[name], second[name])
    model.train()
    assert output(1).loss == output(1).loss
    assert len({output(seed).loss.item() for seed in range(5)}) == 5


@pytest.mark.parametrize("training", [False, True])
@every_objective
def test_context_and_padding_are_never_masked_and_everything_else_is(kind, objective, training):
    model, ever_masked = tiny_model(objective=objective, **KINDS[kind]).train(training), 0
    seen, batch = spy_on_noisy_inputs(model), loss_batch(length=6)
    layout = model.model.lay_out(batch["input_ids"], batch["attention_mask"])
    maskable, real = (layout.scatter(each, False) for each in (batch["labels"] != -100, batch["attention_mask"] != 0))
    for seed in range(30):
        input_ids = torch.where(batch["attention_mask"] != 0, digits(6, 6, seed=seed), PAD)
        with torch.no_grad():
            model(**batch | {"input_ids": input_ids, "labels": input_ids.where(batch["labels"] != -100, -100)})
        masked = seen[-1] == MASK
        assert torch.equal(seen[-1][~masked & real], layout.scatter(input_ids, 0)[~masked & real])
        ever_masked = ever_masked + masked.int()
    assert torch.equal(ever_masked > 0, maskable)


@pytest.mark.parametrize("block_size", [None, 400])
def test_times_are_stratified_over_the_batch_in_training(block_size):
    """A share of masked tokens tells its time: of 8 rows or blocks, sorted, number i has (i + 1/2)/8 in the mean."""
    settings = {"latent_size": 0, "num_hidden_layers": 1, "max_position_embeddings": 1600, **POSITIONS["rotary"]}
    model = tiny_model(block_size=block_size, **settings).train()
    input_ids = digits(8, 400) if block_size is None else digits(2, 1600)
    seen = spy_on_noisy_inputs(model)
    with torch.no_grad():
        for _ in range(10 if block_size is None else 2):
            model(input_ids=input_ids, labels=input_ids)
    shares = (torch.stack(seen).view(-1, 8, 400) == MASK).float().mean(-1)
    # Standard error of one share: 1/sqrt(4 * 400) = 0.025 from the masks and 1/8/sqrt(12) = 0.036 from the time.
    middle = (torch.arange(8) + 0.5) / 8
    in_order = shares.sort(-1).values
    assert (in_order - middle).abs().max() < 1 / 16 + 4 * 0.025
    assert (in_order.mean(0) - middle).abs().max() < 4 * math.hypot(0.025, 0.036) / len(shares) ** 0.5
    assert not torch.equal(shares[0].argsort(), shares[1].argsort())  # which one gets which is drawn


def test_evaluation_gives_equal_blocks_of_a_row_noise_of_their_own():
    model = tiny_model(block_size=64, max_position_embeddings=256, latent_size=0)
    seen, input_ids = spy_on_noisy_inputs(model), digits(1, 64).repeat(1, 4)
    for given in ({}, {"times": torch.full((1, 4), 0.5)}):
        with torch.no_grad():
            model(input_ids=input_ids, labels=input_ids, **given)
        masks = (seen[-1] == MASK).view(4, 64)
        assert len({tuple(mask) for mask in masks.tolist()}) == 4
        shares = masks.float().mean(-1)
        # At t = 1/2 the standard error of a share is 1/16; four times of their own are further apart than that.
        assert ((shares - 0.5).abs().max() < 4 / 16) == bool(given)


@pytest.mark.parametrize("training", [False, True])
def test_time_epsilon_is_the_smallest_time_of_the_paper_s_objective(training):
    input_ids = digits(8, 6)
    for objective, all_masked in (("vmd", True), ("per_step", False)):
        model = tiny_model(objective=objective, time_epsilon=0.9999).train(training)
        seen = spy_on_noisy_inputs(model)
        model(input_ids=input_ids, labels=input_ids)
        assert (seen[0] == MASK).all() == all_masked


@shapes
def test_inputs_and_labels_are_left_as_they_were(block_size):
    model = tiny_model(block_size=block_size).train()
    batch = loss_batch() | noise_for(model, 6, 7)
    before = copy.deepcopy(batch)
    gradients_of(model, model(**batch).loss)
    for name, value in batch.items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("settings", [{}, PER_POSITION, {"block_size": 3}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reconstruction_reaches_every_parameter(objective, settings):
    """The latent encoder, what it reads of the context and the conditioner, through z: the KL term is switched off."""
    model = tiny_model(objective=objective, kl_weight=0, **settings).train()
    gradients = gradients_of(model, model(**loss_batch(), **noise_for(model, 6, 7)).loss)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name


def test_a_collapsed_start_still_teaches_the_modulation():
    """At the start z has no effect, so the encoder gets no gradient from it, but the modulation does."""
    model = VMDForMaskedDiffusion(tiny_config(kl_weight=0)).train()
    model(**loss_batch(), **noise_for(model, 6, 7)).loss.backward()
    for layer in model.model.layers:
        assert layer.modulation.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# The expected loss, by enumeration
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy_of(model, row, masked, revealed, latents=None):
    """Sum of -log p over the revealed positions of one row, in the state with `masked` masked."""
    x_t = row.clone()
    x_t[list(masked)] = MASK
    with torch.no_grad():
        log_probability = model(x_t[None], latents=latents).logits[0].log_softmax(-1)
    return -sum(log_probability[position, row[position]].item() for position in revealed)


def test_the_expected_vmd_loss_weights_mask_sets_by_their_size():
    """E over t and masks of (1/t) sum CE = sum over k of f(k)/k, f(k) = mean over the sets of k masked tokens.

    Because the integral of t^(k-1) (1-t)^(n-k) over t, times the n-choose-k sets, is 1/k.
    """
    model, row = tiny_model(latent_size=0, time_epsilon=1e-6, **POSITIONS["rotary"]).train(), torch.tensor([9, 9, 8])
    cost_of_a_token = []
    for size in (1, 2, 3):
        sets = list(itertools.combinations(range(3), size))
        cost_of_a_token.append(sum(cross_entropy_of(model, row, masked, masked) for masked in sets) / len(sets) / size)
    expected = sum(cost_of_a_token) / 3  # nats a labelled token
    # These weights guess this row well from two of its tokens, badly from none: so the test sees how often each size
    # is drawn, and not only the weight.
    assert cost_of_a_token[2] > 2 * cost_of_a_token[0]

    batch = row.expand(2000, 3)
    with torch.no_grad():
        losses = torch.stack([model(input_ids=batch, labels=batch).loss for _ in range(20)])
    error = losses.std() / 20**0.5
    assert error < 0.01 * expected
    assert abs(losses.mean().item() - expected) < 4 * error


@pytest.mark.parametrize(
    "latent", [{"latent_size": 0}, {}, {"objective": "per_step"}, {"objective": "per_step", "latent_min_tokens": 2}]
)
@pytest.mark.parametrize("objective_steps", [[1], [2], [3], [1, 2, 4]])
def test_the_expected_few_step_loss_is_the_bound(objective_steps, latent):
    """Over a grid of times and all six orders of three tokens, the mean is exactly the bound of the sampler."""
    model = tiny_model(**{"objective": "per_sample", "objective_steps": objective_steps} | latent)
    mdm = of_the_same_weights(model, latent_size=0)
    config, row, latent_noise = model.config, torch.tensor([4, 7, 1]), normal(4)
    orders = list(itertools.permutations(range(3)))
    expected = 0.0
    for num_steps, order in itertools.product(objective_steps, orders):
        row_steps = min(num_steps, 3)
        cuts = [step * 3 // row_steps for step in range(row_steps + 1)]
        for start, end in itertools.pairwise(cuts):
            masked, revealed = order[start:], order[start:end]
            if config.latent_size == 0 or len(revealed) < config.latent_min_tokens:
                expected += cross_entropy_of(mdm, row, masked, revealed)
                continue
            flags = (order, order) if config.objective == "per_sample" else (masked, revealed)
            with torch.no_grad():
                mean, log_variance = posterior_of_row(model, row, *flags)
            latents = (mean + (0.5 * log_variance).exp() * latent_noise)[None]
            expected += cross_entropy_of(model, row, masked, revealed, latents)
    expected /= len(objective_steps) * len(orders) * 3

    cells = 6 * len(objective_steps)  # each T has six cells of time, whichever of 1, 2 or 3 steps it takes
    times = (torch.arange(cells) + 0.5) / cells
    ranks = torch.empty(6, 3)
    for index, order in enumerate(orders):
        ranks[index, list(order)] = torch.tensor([0.1, 0.5, 0.9])
    batch = row.expand(6 * cells, 3)
    noise = {"times": times.repeat(6), "position_noise": ranks.repeat_interleave(cells, 0)}
    if config.latent_size:
        noise["latent_noise"] = latent_noise.expand(len(batch), -1)
    output = model(input_ids=batch, labels=batch, **noise)
    assert output.reconstruction_loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_blocks_of_one_token_are_an_autoregressive_model(position):
    settings = {"block_size": 1, "latent_size": 0, "objective": "per_sample", "objective_steps": [1]}
    model, row = tiny_model(**settings, **POSITIONS[position]), digits(1, 7)[0]
    log_likelihood = []
    for index in range(7):
        prefix = torch.cat([row[:index], torch.tensor([MASK])])[None]
        log_likelihood.append(model(prefix).logits[0, index].log_softmax(-1)[row[index]])
    expected = -torch.stack(log_likelihood)
    assert expected.std() > 0.1

    output = model(input_ids=row[None], labels=row[None])
    torch.testing.assert_close(output.loss * 7, expected.sum())
    for seed in range(3):  # whatever the noise: there is one step, which reveals the token
        noise = noise_for(model, 1, 7, seed)
        torch.testing.assert_close(model.train()(input_ids=row[None], labels=row[None], **noise).loss, output.loss)
    # Prompts are context, and so is what lies between.
    labels = row.clone()
    labels[[0, 1, 4]] = -100
    output = model.eval()(input_ids=row[None], labels=labels[None])
    torch.testing.assert_close(output.loss * 4, expected[[2, 3, 5, 6]].sum())


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def changed(tensor, position, value):
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


LABEL_ERRORS = {
    "label on padding": (
        {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        "labels must be -100 where attention_mask is 0",
    ),
    "mask token": ({"input_ids": changed(IDS, (0, 1), MASK), "labels": changed(IDS, (0, 1), MASK)}, "mask token"),
    "pad token": ({"input_ids": changed(IDS, (1, 2), PAD), "labels": changed(IDS, (1, 2), PAD)}, "pad token"),
    "masked by a collator": ({"input_ids": changed(IDS, (0, 1), MASK)}, r"collator.*mlm=False"),
    "other token": ({"labels": changed(IDS, (0, 1), 7)}, "labels must equal input_ids"),
    "label shape": ({"labels": IDS[:, :2]}, r"labels must have shape \(2, 3\), got \(2, 2\)"),
    "latents": ({"latents": torch.zeros(2, 4)}, "latents must be None when labels are given"),
    "times": ({"times": torch.ones(3)}, r"times must have shape \(2,\), got \(3,\)"),
    "position noise": ({"position_noise": torch.ones(2)}, r"position_noise must have shape \(2, 3\), got \(2,\)"),
    "latent noise": ({"latent_noise": torch.ones(2, 3)}, r"latent_noise must have shape \(2, 4\), got \(2, 3\)"),
    "labels held back": ({"labels": None, "num_items_in_batch": 6}, "label_smoothing_factor"),
    "no inputs": ({"input_ids": None}, r"input_ids must have shape \(batch, length\), got None"),
    "no rows": ({"input_ids": IDS[:0], "labels": IDS[:0]}, r"at least one row and one column, got shape \(0, 3\)"),
    "no columns": ({"input_ids": IDS[:, :0], "labels": IDS[:, :0]}, r"one row and one column, got shape \(2, 0\)"),
    "latents of blocks": (
        {"block_size": 2, "latents": torch.zeros(2, 2, 4)},
        "latents must be None when labels are given",
    ),
    "a time for rows": ({"block_size": 2, "times": torch.ones(2)}, r"times must have shape \(2, 2\), got \(2,\)"),
    "times of blocks": ({"block_size": 2, "times": torch.ones(2, 3)}, r"times must have shape \(2, 2\), got \(2, 3\)"),
    "times in a row": ({"block_size": 2, "times": torch.ones(4)}, r"times must have shape \(2, 2\), got \(4,\)"),
    "noise of rows": (
        {"block_size": 2, "latent_noise": torch.ones(2, 4)},
        r"latent_noise must have shape \(2, 2, 4\), got \(2, 4\)",
    ),
    "noise of blocks": (
        {"block_size": 2, "latent_noise": torch.ones(2, 2, 3)},
        r"latent_noise must have shape \(2, 2, 4\), got \(2, 2, 3\)",
    ),
    "positions of blocks": (
        {"block_size": 2, "position_noise": torch.ones(2, 2, 2)},
        r"position_noise must have shape \(2, 3\), got \(2, 2, 2\)",
    ),
    "slip of the pen": ({"position_noize": IDS}, "forward knows no argument 'position_noize'"),
}


@pytest.mark.parametrize("case", list(LABEL_ERRORS))
@pytest.mark.parametrize("training", [False, True])
def test_misuse_of_the_loss_is_an_error(case, training):
    arguments, message = LABEL_ERRORS[case]
    arguments = {"input_ids": IDS, "labels": IDS} | arguments
    model = tiny_model(block_size=arguments.pop("block_size", None)).train(training)
    model(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("time", [-0.1, 0.0, 1.0, 1.5])
def test_times_out_of_range_are_an_error(time, objective):
    """One number among good ones is enough. `vmd` has times in (0, 1], the few-step objectives numbers in [0, 1)."""
    model, input_ids, times = tiny_model(block_size=2, objective=objective), digits(2, 4), torch.full((2, 2), 0.5)
    times[1, 0] = time
    if time == (1.0 if objective == "vmd" else 0.0):
        assert model(input_ids=input_ids, labels=input_ids, times=times).loss.isfinite()
        return
    with pytest.raises(ValueError, match=r"times must lie in \(0, 1\]" if objective == "vmd" else r"\[0, 1\)"):
        model(input_ids=input_ids, labels=input_ids, times=times)


def test_where_python_must_not_wait_for_labels_the_device_checks_them(monkeypatch):
    """As on an accelerator: the check is an operation of the device's own, whose error comes later."""
    model, checks = tiny_model(), []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "_assert_async", lambda holds, message: checks.append((bool(holds), message)))
    for labels, wrong in ((IDS, []), (changed(IDS, (0, 1), 7), ["labels must equal input_ids where"])):
        checks.clear()
        check_labels(IDS, labels, torch.ones_like(IDS), model.config)
        assert len(checks) == 3
        assert [message[: len(wrong[0])] for holds, message in checks if not holds] == wrong


def test_a_loss_needs_a_mask_token_and_denoising_does_not():
    model = tiny_model(mask_token_id=None)
    assert model(IDS).logits[..., MASK].isfinite().all()
    with pytest.raises(ValueError, match=r"mask_token_id must be set.*None"):
        model(input_ids=IDS, labels=IDS)


def test_mask_and_pad_tokens_may_be_context_and_a_pad_token_that_ends_texts_a_label():
    """Under -100 anything goes: the rule is about what has to be predicted."""
    input_ids, labels = torch.tensor([[1, MASK, 3, PAD]]), torch.tensor([[1, -100, 3, -100]])
    assert tiny_model()(input_ids=input_ids, labels=labels).loss.isfinite()
    ending = torch.tensor([[1, 2, 9]])
    assert tiny_model(pad_token_id=9, eos_token_id=9)(input_ids=ending, labels=ending).loss.isfinite()
