"""The causal head against enumeration, and what must not change it."""

import itertools

import pytest
import torch
from helpers import digits, padded, randomise, seeded, tiny_config, tiny_model, uniform

from vmd_hf import VMDForMaskedDiffusion, nelbo
from vmd_hf.objective_vmd import cross_entropy_of, denoise, read_clean

SHAPES = pytest.mark.parametrize("block_size", [None, 3])
SETTINGS = {"vocab_size": 6, "mask_token_id": 5, "pad_token_id": None, "objective": "per_step", "latent_size": 0}


def causal_model(**overrides):
    """Five tokens and a mask: 125 sequences of three tokens."""
    return tiny_model(causal_head_size=8, **(SETTINGS | overrides))


@SHAPES
@pytest.mark.parametrize("settings", [{}, {"order": "left_to_right"}, {"order": "entropy"}, {"order": "random"}])
def test_probabilities_of_all_sequences_sum_to_one(block_size, settings):
    """In one step, in two of each order that the sampler may follow, and in two of any random order."""
    model = causal_model(block_size=block_size)
    rows = torch.tensor(list(itertools.product(range(5), repeat=3)))
    for seed in range(3 if settings.get("order") == "random" else 1):
        generator = [seeded(seed) for _ in rows]  # the same order for all
        found = nelbo(model, rows, num_steps=2 if settings else 1, generator=generator, **settings).nelbo
        assert (-found.double()).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@SHAPES
def test_a_step_is_the_product_of_what_follows_what(block_size):
    """Token after token, reading one at a time, for a part of the masked tokens."""
    model, row = causal_model(block_size=block_size), torch.tensor([[3, 1, 4, 0, 2, 2]])
    batch = read_clean(model, row, row)
    masked, revealed = torch.zeros(2, 6, dtype=torch.bool)
    masked[[0, 2, 3, 4, 5]] = revealed[[0, 2, 4, 5]] = True
    masked, revealed = (batch.layout.blocks(part[None]) for part in (masked, revealed))
    hidden_states = denoise(model, batch, masked, revealed.sum(-1)).last_hidden_state
    found = cross_entropy_of(model, hidden_states, batch, masked, revealed)[0]
    embeddings, expected = model.get_input_embeddings()(row), []
    for columns in [[0, 2, 4, 5]] if block_size is None else [[0, 2], [4, 5]]:
        total, memory = 0.0, None
        for place, column in enumerate(columns):
            state = hidden_states[:, [column]]
            if place:
                before = [columns[place - 1]]
                args = (embeddings[:, before], hidden_states[:, before], state, memory)
                state, memory = model.causal_head.read(*args)
                assert not torch.allclose(state, hidden_states[:, [column]], atol=1e-2)
            total -= model.compute_logits(state).log_softmax(-1)[0, 0, row[0, column]].item()
        expected.append(total)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@SHAPES
def test_a_step_is_charged_what_it_reveals_and_a_single_token_its_expectation(block_size):
    """Three tokens in two steps: the first reveals one of them, the second the others together."""
    model = causal_model(block_size=block_size, objective_steps=[2])
    input_ids, order = torch.tensor([[3, 1, 4]]), torch.tensor([[0.5, 0.1, 0.9]])
    for time, now, scored in [(0.2, [1], [0, 1, 2]), (0.7, [0, 2], [0, 2])]:
        times = torch.tensor([time]) if block_size is None else torch.tensor([[time]])
        loss = model(input_ids, labels=input_ids, times=times, position_noise=order).loss.item()
        batch = read_clean(model, input_ids, input_ids)
        masked = torch.zeros(1, 1, 3, dtype=torch.bool)
        masked[..., scored] = True
        hidden_states = denoise(model, batch, masked, masked.sum(-1)).last_hidden_state
        if len(now) == 1:
            log_probs = model.compute_logits(hidden_states).log_softmax(-1)[0]
            charged = -log_probs[torch.arange(3), input_ids[0]].mean().item()
        else:
            charged = cross_entropy_of(model, hidden_states, batch, masked, masked).item()
        assert loss == pytest.approx(2 * charged / 3, rel=1e-5)  # two steps, over three tokens


def test_gradients_agree_with_finite_differences():
    model, input_ids = causal_model(objective_steps=[1, 2]), digits(4, 5) % 5
    noise = {"times": torch.tensor([0.1, 0.4, 0.6, 0.9]), "position_noise": uniform(4, 5)}

    def loss():
        return model(input_ids, labels=input_ids, **noise).loss

    loss().backward()
    for name, parameter in model.causal_head.named_parameters():
        direction = torch.randn(parameter.shape, generator=seeded(2))
        slope, values = (parameter.grad * direction).sum().item(), []
        assert slope != 0
        with torch.no_grad():
            for step in (0.004, -0.004):
                parameter += step * direction
                values.append(loss().item())
                parameter -= step * direction
        assert (values[0] - values[1]) / 0.008 == pytest.approx(slope, rel=0.03, abs=2e-3), name


@torch.no_grad()
@SHAPES
@pytest.mark.parametrize("remasking", ["random", "left_to_right", "top_prob"])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_samples_have_the_probabilities_of_the_likelihood(block_size, remasking, num_steps):
    """Frequencies of all sequences, of which two or three tokens come in one step, against exact probabilities."""
    model = causal_model(block_size=block_size)
    number, length = 5_000, 2 if num_steps == 1 else 3
    samples = model.generate(
        torch.full((number, length), 5), do_sample=True, remasking=remasking, num_steps=num_steps, generator=seeded(0)
    )
    rows = torch.tensor(list(itertools.product(range(5), repeat=length)))
    if remasking == "random":  # which of the three comes first
        found = {}
        for seed in range(20 if num_steps > 1 else 1):
            generator = [seeded(seed) for _ in rows]
            probability = (-nelbo(model, rows, num_steps=num_steps, generator=generator).nelbo).exp()
            found[round(probability.max().item(), 4)] = probability
        assert len(found) == (3 if num_steps > 1 else 1)
        expected = torch.stack(list(found.values())).mean(0)
    else:
        expected = (-nelbo(model, rows, num_steps=num_steps, order=remasking).nelbo).exp()
    for row, probability in zip(rows, expected.tolist(), strict=True):
        share = (samples == row).all(-1).float().mean().item()
        assert share == pytest.approx(probability, abs=4 * (probability / number) ** 0.5 + 1e-3), row


@SHAPES
def test_padding_the_batch_and_the_cache_change_nothing(block_size):
    model = causal_model(block_size=block_size)
    rows = [[0, 1, 2, 3, 4, 0, 1], [2, 2, 3, 1]]
    alone = torch.cat([nelbo(model, torch.tensor([row])).nelbo for row in rows])
    for side in ("left", "right"):
        input_ids, attention_mask = padded(rows, side, width=9, fill=0)
        torch.testing.assert_close(nelbo(model, input_ids, attention_mask=attention_mask).nelbo, alone)
    gaps = [[0, 5, 5, 1, 5, 5, 5], [5, 3, 5, 5]]
    settings = {"num_steps": 2, "do_sample": True}

    def fill(rows, seeds, **changes):
        input_ids, attention_mask = padded(rows, "left", fill=0)
        generator = [seeded(seed) for seed in seeds]
        return model.generate(input_ids, attention_mask, generator=generator, **(settings | changes))

    together = fill(gaps, [1, 2])
    assert together[1, -4:].equal(fill(gaps[1:], [2])[0])
    assert together.equal(fill(gaps, [1, 2], use_cache=False))
    assert not together.eq(5).any()


@SHAPES
def test_it_starts_as_the_model_it_is_made_from_and_saves_and_loads(tmp_path, block_size):
    plain = tiny_model(block_size=block_size, **SETTINGS)
    plain.save_pretrained(tmp_path / "plain")
    model = VMDForMaskedDiffusion.from_pretrained(tmp_path / "plain", causal_head_size=8).eval()
    input_ids = digits(8, 6) % 5
    torch.testing.assert_close(nelbo(model, input_ids).nelbo, nelbo(plain, input_ids).nelbo)
    assert model.causal_head.rnn.weight_hh_l0.std() > 0.1
    assert model.causal_head.state_proj.weight.std().item() == pytest.approx(8**-0.5, rel=0.2)
    randomise(model.causal_head)
    assert not torch.allclose(nelbo(model, input_ids).nelbo, nelbo(plain, input_ids).nelbo)
    model.save_pretrained(tmp_path / "causal")
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path / "causal").eval()
    torch.testing.assert_close(nelbo(loaded, input_ids).nelbo, nelbo(model, input_ids).nelbo)


def test_what_does_not_fit_is_an_error():
    for settings in ({"latent_size": 4}, {"objective": "vmd"}, {"causal_head_size": -1}):
        with pytest.raises(ValueError, match="causal_head_size must be 0, or above with latent_size 0 and objective"):
            tiny_config(**({"causal_head_size": 8, "latent_size": 0, "objective": "per_step"} | settings))
    with pytest.raises(ValueError, match="position_ids must not restart within a row"):
        nelbo(causal_model(), torch.tensor([[0, 1, 2, 3]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
