"""The chain against enumeration over all its paths, and what must not change it."""

import itertools
import math

import pytest
import torch
from helpers import digits, of_the_same_weights, padded, randomise, tiny_config, tiny_model, uniform

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, nelbo
from vmd_hf.chain_vmd import NUM_TOKENS, log_product
from vmd_hf.objective_vmd import chain_cross_entropy, cross_entropy_of, denoise, marginal_logits, read_clean

SHAPES = pytest.mark.parametrize("block_size", [None, 3])
CANDIDATES = pytest.mark.parametrize("candidates", [128, 2])


def chain_model(num_states=3, **overrides):
    """Five tokens and a mask: 125 sequences of three tokens."""
    settings = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": None, "objective": "per_step"}
    return tiny_model(latent_type="chain", latent_size=num_states, **(settings | overrides))


def hidden_states_of(model, input_ids, masked):
    """Of one row (1, length) in which some tokens are masked: what was read, the mask, and hidden states."""
    batch = read_clean(model, input_ids, input_ids)
    mask = torch.zeros(1, input_ids.shape[1], dtype=torch.bool)
    mask[0, masked] = True
    mask = batch.layout.blocks(mask)
    return batch, mask, denoise(model, batch, mask, mask.sum(-1)).last_hidden_state


def joint_by_enumeration(model, hidden_states, row, columns):
    """p(tokens at these columns | x_t) as a sum over all paths of states, written down from the formulas."""
    chain, known = model.chain, model.chain.known(model.get_input_embeddings()(row))
    num_states, one, tables = chain.num_states, torch.tensor, chain.tables()
    factors = [model.compute_logits(hidden_states[columns[0]]).softmax(-1)[row[columns[0]]].expand(num_states)]
    kernels, nearest = [], [torch.zeros(1, known.shape[-1])] * NUM_TOKENS
    for before, column in itertools.pairwise(columns):
        scores, weights = chain.remember(known[[before]], hidden_states[[before]])
        if before == columns[0]:
            kernels.append(scores.softmax(-1).expand(num_states, -1))
        else:
            kernels.append(chain.transitions(scores, weights, tables)[0])
        nearest = [known[[before]], *nearest[:-1]]
        here = hidden_states[[column]]
        surroundings = chain.surroundings(hidden_states[[before]], here, one([column - before]), tables)
        changed, tilts = chain.read(torch.cat(nearest, dim=-1), surroundings, here)
        logits = model.compute_logits(changed)
        states = range(num_states)
        of_states = [chain.token_log_probs(tilts, logits, one([state]), tables)[0, row[column]] for state in states]
        factors.append(torch.stack(of_states).exp())
    total = 0.0
    for path in itertools.product(range(num_states), repeat=len(columns) - 1):
        probability = factors[0][0].item()
        for place, state in enumerate(path):
            probability *= (
                kernels[place][path[place - 1] if place else 0, state].item() * factors[place + 1][state].item()
            )
        total += probability
    return total


@SHAPES
@CANDIDATES
@pytest.mark.parametrize("given", [[], [1]])
def test_probabilities_of_all_sequences_sum_to_one(block_size, candidates, given):
    model = chain_model(block_size=block_size, candidate_tokens=candidates)
    rows = torch.tensor(list(itertools.product(range(5), repeat=3)))
    rows = rows[(rows[:, given] == 2).all(-1)]
    labels = rows.clone()
    labels[:, given] = -100
    total = (-nelbo(model, rows, labels).nelbo.double()).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@CANDIDATES
@pytest.mark.parametrize(
    ("masked", "revealed"),
    [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([0, 2, 3, 4, 5], [2, 4, 5]), ([1, 2, 4, 5], [1, 5]), ([1, 2], [2])],
)
def test_the_probability_of_a_step_is_a_sum_over_paths(candidates, masked, revealed):
    model, row = (
        chain_model(max_position_embeddings=6, candidate_tokens=candidates),
        torch.tensor([[0, 3, 1, 4, 2, 2]]),
    )
    randomise(model.chain, std=0.5)
    batch, mask, hidden_states = hidden_states_of(model, row, masked)
    now = torch.zeros_like(mask)
    now[..., revealed] = True
    expected = joint_by_enumeration(model, hidden_states[0], row[0], revealed)
    found = cross_entropy_of(model, hidden_states, batch, mask, now)
    assert found.neg().exp().item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
@CANDIDATES
def test_token_probabilities_given_a_state_are_its_emissions(candidates):
    model = chain_model(candidate_tokens=candidates)
    tilts, logits, tables = torch.randn(4, model.config.conditioning_size), torch.randn(4, 6), model.chain.tables()
    for state in range(3):
        log_probs = model.chain.token_log_probs(tilts, logits, torch.full((4,), state), tables)
        assert log_probs.exp().sum(-1).tolist() == pytest.approx([1] * 4, abs=1e-5)
        for token in range(6):
            emissions = model.chain.emission_log_probs(tilts, logits, torch.full((4,), token), tables)
            torch.testing.assert_close(log_probs[:, token], emissions[:, state])


@SHAPES
def test_one_token_a_step_is_the_model_without_a_latent(block_size):
    settings = {"block_size": block_size, "objective_steps": [3]}
    model = chain_model(**settings)
    plain, input_ids = of_the_same_weights(model, latent_size=0, latent_type="gaussian"), digits(4, 3) % 5
    torch.testing.assert_close(model(input_ids, labels=input_ids).loss, plain(input_ids, labels=input_ids).loss)
    bounds = [nelbo(one, input_ids, num_steps=3, generator=torch.Generator().manual_seed(0)) for one in (model, plain)]
    torch.testing.assert_close(bounds[0].nelbo, bounds[1].nelbo)
    canvas = torch.cat([digits(4, 1) % 5, torch.full((4, 2), 5)], dim=1)
    for remasking in ("left_to_right", "entropy"):
        filled = [one.generate(canvas, num_steps=3, remasking=remasking) for one in (model, plain)]
        assert filled[0].equal(filled[1])


@SHAPES
def test_training_starts_near_the_model_without_a_chain(tmp_path, block_size):
    settings = {"objective": "per_step", "objective_steps": [1]}  # steps that the two score alike
    tiny_model(latent_size=0, block_size=block_size, **settings).save_pretrained(tmp_path)
    plain = VMDForMaskedDiffusion.from_pretrained(tmp_path).eval()
    torch.manual_seed(0)
    settings = {"latent_type": "chain", "latent_size": 64, "conditioning_size": 32}
    model = VMDForMaskedDiffusion.from_pretrained(tmp_path, **settings).eval()
    input_ids = digits(32, 12)
    loss, expected = (each(input_ids, labels=input_ids).loss.item() for each in (model, plain))
    assert loss == pytest.approx(expected, rel=0.005)


def test_long_products_agree_with_a_recursion_over_logarithms_in_double_precision():
    length, num_states = 1023, 6
    factors = (-30 * uniform(2, length, num_states)).exp()
    matrices = torch.randn(2, length, num_states, num_states).mul(3).softmax(-1) * factors[:, :, None]
    found = log_product(matrices)
    for row in range(2):
        alpha = torch.full((num_states,), -math.log(num_states), dtype=torch.double)
        for matrix in matrices[row].double().log():
            alpha = (alpha[:, None] + matrix).logsumexp(0)
        assert found[row].item() == pytest.approx(alpha.logsumexp(0).item(), rel=1e-5)


@CANDIDATES
def test_gradients_agree_with_finite_differences(candidates):
    model, input_ids = chain_model(conditioning_size=4, candidate_tokens=candidates), digits(3, 5) % 5
    noise = {"times": torch.tensor([0.1, 0.4, 0.7]), "position_noise": uniform(3, 5)}

    def loss():
        return model(input_ids, labels=input_ids, **noise).loss

    loss().backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        slope = (parameter.grad * direction).sum().item()
        with torch.no_grad():
            values = []
            for step in (0.002, -0.002):
                parameter += step * direction
                values.append(loss().item())
                parameter -= step * direction
        assert (values[0] - values[1]) / 0.004 == pytest.approx(slope, rel=0.02, abs=3e-3), name


@SHAPES
def test_neither_padding_nor_the_batch_changes_a_row(block_size):
    model = chain_model(block_size=block_size, max_position_embeddings=16)
    rows = [[0, 1, 2, 3, 4, 0, 1], [2, 2, 3, 1]]
    alone = torch.cat([nelbo(model, torch.tensor([row])).nelbo for row in rows])
    for side in ("left", "right"):
        input_ids, attention_mask = padded(rows, side, width=9, fill=0)
        torch.testing.assert_close(nelbo(model, input_ids, attention_mask=attention_mask).nelbo, alone)


@torch.no_grad()
def test_packed_documents_have_chains_of_their_own():
    model = chain_model(max_position_embeddings=16)
    rows = [[0, 1, 2, 3], [2, 2, 3], [4]]
    expected = sum(nelbo(model, torch.tensor([row])).nelbo for row in rows)
    packed = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    torch.testing.assert_close(nelbo(model, packed, position_ids=positions).nelbo, expected)


@SHAPES
@pytest.mark.parametrize("left_to_right", [0.0, 1.0])
def test_a_step_is_charged_the_mean_of_all_sets_that_it_could_reveal(block_size, left_to_right):
    """Four tokens in two steps: the first of them could reveal two pairs, of which both teach."""
    model = chain_model(block_size=block_size and 4, objective_steps=[2], left_to_right=left_to_right)
    input_ids, order = torch.tensor([[3, 1, 4, 2]]), torch.tensor([[0.5, 0.1, 0.9, 0.2]])
    sets_of = {0.2: [[1, 3], [0, 2]], 0.7: [[0, 2]]}
    if left_to_right:
        sets_of = {0.2: [[0, 1]], 0.7: [[2, 3]]}
    for time, sets in sets_of.items():
        times = torch.tensor([time]) if block_size is None else torch.tensor([[time]])
        loss = model(input_ids, labels=input_ids, times=times, position_noise=order).loss.item()
        masked = [0, 1, 2, 3] if time < 0.5 else sets[0]
        batch, mask, hidden_states = hidden_states_of(model, input_ids, masked)
        joint = 0.0
        for revealed in sets:
            now = torch.zeros_like(mask)
            now[..., revealed] = True
            joint += cross_entropy_of(model, hidden_states, batch, mask, now).item() / len(sets)
        assert loss == pytest.approx(2 * joint / 4, rel=1e-5)  # two steps, over four tokens


@torch.no_grad()
@pytest.mark.parametrize("order", ["left_to_right", "top_prob", "top_prob_margin", "entropy"])
@pytest.mark.parametrize("num_states", [0, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_likelihood_along_an_order_is_that_of_the_sampler(order, num_states, num_steps):
    """The probabilities of all sequences sum to 1, and each is the product over the steps of a plain loop."""
    model = chain_model(num_states)
    rows = torch.tensor(list(itertools.product(range(5), repeat=3)))
    found = (-nelbo(model, rows, order=order, num_steps=num_steps).nelbo.double()).exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    batch = read_clean(model, rows, rows)
    ends = {1: [0, 3], 2: [0, 1, 3], 3: [0, 1, 2, 3]}[num_steps]
    for index in (0, 7, 62, 124):
        row, masked, log_prob = batch.select(torch.tensor([index])), [0, 1, 2], 0.0
        for before, after in itertools.pairwise(ends):
            mask = torch.zeros(1, 1, 3, dtype=torch.bool)
            mask[0, 0, masked] = True
            hidden_states = denoise(model, row, mask, mask.sum(-1)).last_hidden_state
            probs = marginal_logits(model, hidden_states, row, mask).softmax(-1)
            best = probs.sort(-1, descending=True).values
            keys = {
                "left_to_right": -torch.arange(3.0)[masked],
                "top_prob": best[:, 0],
                "top_prob_margin": best[:, 0] - best[:, 1],
                "entropy": torch.special.xlogy(probs, probs).sum(-1),
            }
            chosen = [masked[place] for place in keys[order].argsort(descending=True)[: after - before]]
            now = torch.zeros_like(mask)
            now[0, 0, chosen] = True
            if num_states:
                log_prob -= chain_cross_entropy(model, hidden_states, row, now.long() - 1).item()
            else:
                log_prob += sum(probs[masked.index(column), rows[index, column]].log().item() for column in chosen)
            masked = [column for column in masked if column not in chosen]
        assert math.log(found[index]) == pytest.approx(log_prob, abs=1e-4)


@SHAPES
def test_an_order_changes_nothing_in_one_step(block_size):
    model, rows = chain_model(block_size=block_size), digits(3, 6) % 5
    exact = nelbo(model, rows)
    assert exact.standard_error.eq(0).all()  # there is nothing to draw
    torch.testing.assert_close(nelbo(model, rows, order="entropy", batch_size=2).nelbo, exact.nelbo)
    with pytest.raises(ValueError, match="order must be 'random' with a Gaussian latent"):
        nelbo(tiny_model(), rows, order="entropy")
    with pytest.raises(ValueError, match=r"order must be one of .* got .best."):
        nelbo(model, rows, order="best")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "per_sample"}, "latent_type='chain' needs objective 'vmd' or 'per_step'.*got 'per_sample'"),
        ({"prior": "learned", "block_size": 4}, "prior='learned' needs blocks.*latent_type='chain'"),
        ({"latent_input": "layers_and_positions"}, "needs a Gaussian latent.*latent_type='chain'"),
        ({"left_to_right": 1.5, "objective": "per_step"}, "left_to_right must lie in .* got 1.5"),
        ({"left_to_right": 0.5}, "left_to_right must .* be 0 under the vmd objective.* got 0.5"),
    ],
)
def test_what_does_not_fit_a_chain_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(latent_type="chain", **settings)


def test_it_saves_and_loads(tmp_path):
    model, input_ids = chain_model(), digits(2, 4) % 5
    model.save_pretrained(tmp_path)
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.config, VMDConfig) and loaded.config.num_states == 3
    torch.testing.assert_close(nelbo(loaded, input_ids).nelbo, nelbo(model, input_ids).nelbo)


@SHAPES
@CANDIDATES
@pytest.mark.parametrize("remasking", ["random", "left_to_right", "top_prob"])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_samples_have_the_probabilities_of_the_likelihood(block_size, candidates, remasking, num_steps):
    """Frequencies of all sequences of three tokens, two of them masked, against their exact probabilities."""
    model = chain_model(block_size=block_size, candidate_tokens=candidates)
    number = 20_000
    canvas = torch.tensor([[3, 5, 5]]).expand(number, -1)
    settings = {"do_sample": True, "remasking": remasking, "num_steps": num_steps}
    samples = model.generate(canvas, generator=torch.Generator().manual_seed(0), **settings)
    rows = torch.tensor([(3, *pair) for pair in itertools.product(range(5), repeat=2)])
    labels = torch.cat([torch.full_like(rows[:, :1], -100), rows[:, 1:]], dim=1)
    if remasking == "random":  # the expectation over both orders
        bounds = [nelbo(model, rows, labels, num_steps=num_steps, generator=torch.Generator().manual_seed(seed)).nelbo
                  for seed in range(20)]  # fmt: skip
        orders = torch.stack(bounds)
        expected = (-torch.stack([orders.amin(0), orders.amax(0)])).exp().mean(0)
    else:
        expected = (-nelbo(model, rows, labels, num_steps=num_steps, order=remasking).nelbo).exp()
    for row, probability in zip(rows, expected.tolist(), strict=True):
        share = (samples == row).all(-1).float().mean().item()
        assert share == pytest.approx(probability, abs=4 * (probability / number) ** 0.5 + 1e-3), row


@SHAPES
def test_states_are_returned_and_may_be_given(block_size):
    model = chain_model(block_size=block_size)
    canvas = torch.full((4, 6), 5)
    settings = {"num_steps": 2, "return_dict_in_generate": True}
    first = model.generate(canvas, do_sample=False, generator=torch.Generator().manual_seed(1), **settings)
    shape = (4, 6) if block_size is None else (4, 2, 3)
    assert first.latents.shape == shape and first.latents.dtype == torch.long and first.latents.max() > 0
    again = model.generate(canvas, do_sample=False, latents=first.latents, **settings)
    assert again.sequences.equal(first.sequences) and again.latents.equal(first.latents)
    most_probable = [model.generate(canvas, latent_scale=0.0, **settings) for _ in range(2)]
    assert most_probable[0].sequences.equal(most_probable[1].sequences)
    assert most_probable[0].sequences.eq(most_probable[0].sequences[:1]).all()
    for latents, message in [
        (first.latents.float(), "latents must be states of the chain, integers from 0 to 2"),
        (first.latents + 3, "latents must be states of the chain"),
        (first.latents[:, :1], r"latents must have shape \(batch, "),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(canvas, latents=latents)
    with pytest.raises(ValueError, match=r"latent_scale must be 1 .* or 0 .* for a chain, got 0.5"):
        model.generate(canvas, latent_scale=0.5)


@SHAPES
def test_a_processor_of_logits_and_a_rule_of_ones_own(block_size):
    """Both see what tokens have by themselves; what a processor forbids does not come behind another token either."""
    model, canvas = chain_model(block_size=block_size), torch.full((64, 6), 5)

    def forbid(sequences, scores):
        assert len(sequences) == len(scores)
        return scores.index_fill(-1, torch.tensor([0, 2]), -torch.inf)

    settings = {"num_steps": 1, "do_sample": True, "generator": torch.Generator().manual_seed(0)}
    filled = model.generate(canvas, logits_processor=forbid, **settings)
    assert set(filled.unique().tolist()) == {1, 3, 4}
    rule = lambda candidates: candidates.columns.float()  # noqa: E731
    settings |= {"num_steps": 3, "return_dict_in_generate": True, "output_history": True, "output_confidences": True}
    output = model.generate(canvas, remasking=rule, **settings)
    assert output.history[0][:, -1 if block_size is None else 2].ne(5).all() and output.history[0][:, 0].eq(5).all()
    assert output.confidences.gt(0).all() and output.confidences.lt(1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 5, "eos_token_id": 4},
        {"confidence_threshold": 0.5, "remasking": "top_prob"},
        {"corrector": "confidence", "num_steps": 4},
        {"guidance_scale": 1.5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_confidences": True, "return_dict_in_generate": True},
        {"remasking": "top_prob_margin", "temperature": 0.7, "top_k": 3},
    ],
)
@SHAPES
def test_a_row_does_not_depend_on_the_batch_whatever_the_settings(block_size, settings):
    model = chain_model(block_size=block_size)
    rows = [[0, 5, 5, 1, 5, 2, 5], [5, 3, 5, 5]]
    settings = {"num_steps": 2, "do_sample": True, "generator": None, **settings}

    def fill(rows, seeds):
        input_ids, attention_mask = padded(rows, "left", fill=0)
        settings["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        filled = model.generate(input_ids, attention_mask, **settings)
        if settings.get("return_dict_in_generate"):
            filled = filled.sequences
        return filled

    together, alone = fill(rows, [1, 2]), fill(rows[1:], [2])
    width = alone.shape[1]
    assert together[1, -width:].equal(alone[0])  # (its padding moved along)
    assert not together.eq(5)[:, -4:].any() or "eos_token_id" in settings
