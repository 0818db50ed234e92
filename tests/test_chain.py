"""The chain against enumeration over all its paths, and what must not change it."""

import itertools
import math

import pytest
import torch
from helpers import digits, of_the_same_weights, padded, randomise, tiny_config, tiny_model, uniform

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, nelbo
from vmd_hf.chain_vmd import Transitions, chain_log_probs, draw_states, most_probable_states, state_marginals
from vmd_hf.objective_vmd import chain_cross_entropy, denoise, marginal_logits, read_clean

SHAPES = pytest.mark.parametrize("block_size", [None, 3])
CANDIDATES = pytest.mark.parametrize("candidates", [128, 2])


def chain_model(num_states=3, **overrides):
    """Five tokens and a mask: 125 sequences of three tokens."""
    settings = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": None, "objective": "per_step"}
    return tiny_model(latent_type="chain", latent_size=num_states, **(settings | overrides))


def transitions_of(model, input_ids, masked):
    """Of one row (1, length) in which some tokens are masked, its hidden states (length, hidden) and their logits."""
    batch = read_clean(model, input_ids, input_ids)
    mask = torch.zeros(1, input_ids.shape[1], dtype=torch.bool)
    mask[0, masked] = True
    outputs = denoise(model, batch, batch.layout.blocks(mask), mask.sum(-1, keepdim=True))
    hidden_states = outputs.last_hidden_state
    return model.chain.transitions(hidden_states), mask, hidden_states[0], model.compute_logits(hidden_states[0])


def repeated(transitions, number, row=0):
    """The transitions of one row as those of many."""
    parts = (transitions.start, transitions.scores, transitions.weights)
    return Transitions(*(part[[row]].expand(number, *part.shape[1:]) for part in parts), transitions.kernels)


def matrices(transitions):
    """T of each column."""
    return [column.matrix() for column in transitions.columns()]


def paths(transitions, masked):
    """Every path of states of the masked columns with its probability, by multiplication."""
    matrix = matrices(transitions)
    for path in itertools.product(range(transitions.start.shape[2]), repeat=len(masked)):
        probability = transitions.start[0, masked[0], path[0]].item()
        for place in range(1, len(masked)):
            probability *= matrix[masked[place]][0, path[place - 1], path[place]].item()
        yield path, probability


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
def test_joint_probabilities_and_marginals_are_sums_over_paths(candidates):
    model = chain_model(max_position_embeddings=6, candidate_tokens=candidates)
    row = torch.tensor([[0, 3, 1, 4, 2, 2]])
    for masked, revealed in [([0, 1, 2], [0, 1, 2]), ([0, 2, 3, 5], [2, 5]), ([1, 2, 4], [4]), ([5], [5])]:
        transitions, mask, hidden_states, logits = transitions_of(model, row, masked)
        every = list(paths(transitions, masked))
        assert sum(probability for _, probability in every) == pytest.approx(1, abs=1e-5)
        emissions = model.chain.emission_log_probs(hidden_states, logits, row[0])  # (length, K)
        expected = sum(
            probability
            * math.prod(
                emissions[column, state].exp().item()
                for column, state in zip(masked, path, strict=True)
                if column in revealed
            )
            for path, probability in every
        )
        scored = torch.zeros_like(mask)
        scored[0, revealed] = True
        found = chain_log_probs(transitions, emissions[None], mask, scored)
        assert found[~scored].eq(0).all()
        assert found.sum().exp().item() == pytest.approx(expected, rel=1e-4)

        marginals = state_marginals(transitions, mask)
        for place, column in enumerate(masked):
            of_state = [sum(p for path, p in every if path[place] == state) for state in range(3)]
            assert marginals[0, column].tolist() == pytest.approx(of_state, abs=1e-5)
            mixture = (torch.tensor(of_state) @ emissions[column].exp()).log().item()
            log_probs = model.chain.marginal_log_probs(hidden_states[[column]], logits[[column]], marginals[:, column])
            assert log_probs[0, row[0, column]].item() == pytest.approx(mixture, abs=1e-4)
            assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@CANDIDATES
def test_token_probabilities_given_a_state_are_its_emissions(candidates):
    model, row = chain_model(candidate_tokens=candidates), digits(1, 4) % 5
    _, _, hidden_states, logits = transitions_of(model, row, [0, 1, 2, 3])
    for state in range(3):
        log_probs = model.chain.token_log_probs(hidden_states, logits, torch.full((4,), state))
        assert log_probs.exp().sum(-1).tolist() == pytest.approx([1] * 4, abs=1e-5)
        for token in range(5):
            emissions = model.chain.emission_log_probs(hidden_states, logits, torch.full((4,), token))
            torch.testing.assert_close(log_probs[:, token], emissions[:, state])


@torch.no_grad()
@pytest.mark.parametrize("masked", [[0, 1, 2, 3], [1, 3], [2], [0, 2, 3]])
def test_most_probable_path_is_the_best_of_all(masked):
    for seed in range(5):
        model = randomise(chain_model(), std=1.0, seed=seed)
        transitions, mask, *_ = transitions_of(model, digits(1, 4, seed) % 5, masked)
        best = max(paths(transitions, masked), key=lambda pair: pair[1])[0]
        assert most_probable_states(transitions, mask)[0, masked].tolist() == list(best)


@torch.no_grad()
def test_paths_are_drawn_with_their_probabilities():
    model, row, masked = chain_model(num_states=2), torch.tensor([[0, 1, 2, 3]]), [0, 2, 3]
    transitions, mask, *_ = transitions_of(model, row, masked)
    number = 20_000
    many = repeated(transitions, number)
    noise = -uniform(number, 4, 2).clamp(min=1e-9).log()
    drawn = draw_states(many, mask.expand(number, -1), noise)[:, masked]
    for path, probability in paths(transitions, masked):
        share = (drawn == torch.tensor(path)).all(-1).float().mean().item()
        assert share == pytest.approx(probability, abs=4 * (probability / number) ** 0.5 + 1e-4)


@SHAPES
@pytest.mark.parametrize("objective", ["vmd", "per_step"])
def test_one_state_is_the_model_without_a_latent(block_size, objective):
    model = chain_model(num_states=1, block_size=block_size, objective=objective)
    plain = of_the_same_weights(model, latent_size=0)
    input_ids = digits(4, 6) % 5
    torch.testing.assert_close(model(input_ids, labels=input_ids).loss, plain(input_ids, labels=input_ids).loss)
    settings = {"num_steps": 2, "generator": torch.Generator().manual_seed(0)}
    bound = nelbo(model, input_ids, **settings).nelbo
    settings["generator"].manual_seed(0)
    torch.testing.assert_close(bound, nelbo(plain, input_ids, **settings).nelbo)


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


def test_long_chains_agree_with_a_recursion_over_logarithms_in_double_precision():
    length, num_states = 1024, 6
    model = chain_model(num_states=num_states, max_position_embeddings=length)
    randomise(model.chain, std=1.5)
    hidden_states = 3 * torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))
    emissions = -30 * uniform(2, length, num_states)
    with torch.no_grad():
        transitions = model.chain.transitions(hidden_states)
        every = torch.ones(2, length, dtype=torch.bool)
        found = chain_log_probs(transitions, emissions, every, every).sum(-1)
        matrix_of = matrices(transitions)
        for row in range(2):
            alpha = transitions.start[row, 0].double().log() + emissions[row, 0].double()
            for column in range(1, length):
                matrix = matrix_of[column][row].double().log()
                alpha = (alpha[:, None] + matrix).logsumexp(0) + emissions[row, column].double()
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
def test_a_step_is_charged_its_share_of_the_joint_of_all_masked_tokens(block_size):
    model = chain_model(block_size=block_size, objective_steps=[3])
    input_ids = torch.tensor([[3, 1, 4]])
    for step, times in enumerate((0.0, 0.4, 0.7)):  # the three steps, which find 3, 2 and 1 tokens masked
        times = torch.tensor([times]) if block_size is None else torch.tensor([[times]])
        order = torch.tensor([[0.5, 0.1, 0.9]])
        loss = model(input_ids, labels=input_ids, times=times, position_noise=order).loss.item()
        masked = order.argsort(-1).argsort(-1)[None] >= step
        batch = read_clean(model, input_ids, input_ids)
        hidden_states = denoise(model, batch, masked, masked.sum(-1)).last_hidden_state
        joint = chain_cross_entropy(model, hidden_states, batch, masked, masked).item()
        assert loss == pytest.approx(3 * joint / (3 - step) / 3, rel=1e-5)  # T times the share, over 3 tokens


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
                log_prob -= chain_cross_entropy(model, hidden_states, row, mask, now).item()
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
@pytest.mark.parametrize("remasking", ["random", "left_to_right", "entropy"])
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
