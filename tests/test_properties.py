"""What holds for any rows, lengths, padding and numbers of steps: examples by hypothesis, always the same ones."""

import functools
import math

import pytest
import torch
from helpers import MASK, PAD, seeded, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmd_hf import nelbo
from vmd_hf.blocks_vmd import row_positions
from vmd_hf.noise_vmd import (
    corrupt_at_time,
    corrupt_before_step,
    hashed_noise,
)
from vmd_hf.schedule_vmd import num_revealed, step_schedule

COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
cheap = settings(max_examples=60, **COMMON)
few = settings(max_examples=25, **COMMON)

MODELS = {
    "whole": {},
    "whole, no latent": {"latent_size": 0, "objective": "per_sample"},
    "whole, a latent for each position": {
        "latent_input": "position_slices",
        "latent_size": 32,
        "objective": "per_step",
    },
    "blocks, a latent for each position": {"block_size": 2, "latent_input": "position_slices", "prior": "learned"},
    "blocks": {"block_size": 3, "objective": "per_step"},
    "blocks, learned prior": {"block_size": 2, "prior": "learned", "objective": "per_sample"},
    "autoregressive": {"block_size": 1, "latent_size": 0},
}
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def model_of(name):
    # With rotary positions alone, the tokens of a text of masks are equally sure, and rounding says which comes first.
    return tiny_model(
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        position_embedding_type="learned",
        **MODELS[name],
    )


digit = st.integers(0, 9)
rows_of_digits = st.lists(st.lists(digit, min_size=1, max_size=7), min_size=1, max_size=4)
bounds = st.sampled_from(["per_sample", "per_step"])
draws = st.sampled_from([1, 3])
rules = st.sampled_from(["random", "top_prob", "top_prob_margin", "entropy"])


@st.composite
def padded_rows(draw, rows=rows_of_digits):
    """Rows, and them as a batch with any padding on both sides: (rows, input_ids, attention_mask, starts)."""
    rows = draw(rows)
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    starts = [draw(st.integers(0, width - len(row))) for row in rows]
    input_ids = torch.full(
        (len(rows), width), draw(st.sampled_from([PAD, 3, MASK]))
    )  # what stands there does not matter
    attention_mask = torch.zeros_like(input_ids)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        input_ids[index, start : start + len(row)] = torch.tensor(row)
        attention_mask[index, start : start + len(row)] = 1
    return rows, input_ids, attention_mask, starts


@st.composite
def flagged(draw, rows):
    """For each row as many booleans as it has tokens."""
    return [draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Noise and the schedule
# ---------------------------------------------------------------------------------------------------------------------


@cheap
@given(n=st.integers(0, 3000), num_steps=st.integers(1, 4000))
def test_after_step_k_exactly_floor_k_n_over_t_tokens_are_revealed(n, num_steps):
    row_steps = step_schedule(torch.tensor([n]), num_steps)
    assert row_steps.item() == min(n, num_steps)
    counts = num_revealed(torch.arange(row_steps.item() + 1), torch.tensor(n), row_steps)
    assert counts.tolist() == [k * n // max(row_steps.item(), 1) for k in range(row_steps.item() + 1)]
    assert counts[0] == 0 and counts[-1] == n and (counts.diff() >= 1).all()


@st.composite
def maskable_rows(draw):
    """(batch, length) bool and uniform numbers of the same shape, a few of them equal."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flags = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    noise = draw(st.lists(st.integers(0, 15), min_size=batch * length, max_size=batch * length))
    return torch.tensor(flags).view(batch, length), torch.tensor(noise).view(batch, length) / 16


@cheap
@given(maskable_rows(), st.data())
def test_at_a_time_what_is_maskable_and_below_it_is_masked(rows, data):
    maskable, noise = rows
    sixteenths = data.draw(st.lists(st.integers(1, 16), min_size=len(maskable), max_size=len(maskable)))
    state = corrupt_at_time(maskable, torch.tensor(sixteenths) / 16, noise)
    for row, time in enumerate(sixteenths):
        expected = [bool(m) and round(16 * u) < time for m, u in zip(maskable[row], noise[row].tolist(), strict=True)]
        assert state.masked[row].tolist() == state.revealed[row].tolist() == expected
        assert state.weight[row].item() == pytest.approx(16 / time)


@cheap
@given(maskable_rows(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
def test_the_steps_of_an_objective_part_the_maskable_tokens_in_the_order_of_the_noise(rows, objective_steps, data):
    maskable, noise = rows
    which = data.draw(st.integers(0, len(objective_steps) - 1))
    counts = maskable.sum(-1)
    row_steps = [max(min(objective_steps[which], n), 1) for n in counts.tolist()]
    revealed_before = torch.zeros_like(maskable)
    for k in range(1, max(row_steps) + 1):
        # The middle of the interval of times that stand for this step.
        times = torch.tensor([(which + (min(k, T) - 0.5) / T) / len(objective_steps) for T in row_steps])
        state = corrupt_before_step(maskable, times, noise, objective_steps)
        for row, (n, T) in enumerate(zip(counts.tolist(), row_steps, strict=True)):
            if k > T:
                continue
            assert state.masked[row].tolist() == (maskable & ~revealed_before)[row].tolist()
            assert state.revealed[row].sum() == k * n // T - (k - 1) * n // T
            later = state.masked[row] & ~state.revealed[row]
            if state.revealed[row].any() and later.any():
                assert noise[row][state.revealed[row]].max() <= noise[row][later].min()
            assert state.weight[row] == min(objective_steps[which], n)
            revealed_before[row] |= state.revealed[row]
    assert torch.equal(revealed_before, maskable)


@cheap
@given(padded_rows(), st.integers(0, 3))
def test_hashed_noise_belongs_to_the_row(batch, latent_size):
    rows, input_ids, attention_mask, starts = batch
    real = attention_mask != 0
    noise = hashed_noise(input_ids, real, row_positions(real), (latent_size,))
    for numbers in (noise.times, noise.positions):
        assert ((0 <= numbers) & (numbers < 1)).all()
    assert noise.latents.isfinite().all()
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        alone = hashed_noise(torch.tensor([row]), None, torch.arange(len(row))[None], (latent_size,))
        assert torch.equal(noise.times[index], alone.times[0])
        assert torch.equal(noise.latents[index], alone.latents[0])
        assert torch.equal(noise.positions[index, start : start + len(row)], alone.positions[0])


# ---------------------------------------------------------------------------------------------------------------------
# Models: a row's own result, whatever stands beside it
# ---------------------------------------------------------------------------------------------------------------------


def latents_for(model, batch, num_blocks):
    size = model.config.latent_size
    if size == 0:
        return None
    shape = (batch, size) if model.config.block_size is None else (batch, num_blocks, size)
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


@every_model
@few
@given(padded_rows(), st.data())
def test_logits_do_not_depend_on_padding(name, batch, data):
    model = model_of(name)
    rows, input_ids, attention_mask, starts = batch
    masks = data.draw(flagged(rows))
    rows = [[MASK if m else token for token, m in zip(*pair, strict=True)] for pair in zip(rows, masks, strict=True)]
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        input_ids[index, start : start + len(row)] = torch.tensor(row)
    num_blocks = model.model.lay_out(input_ids, attention_mask).num_blocks
    latents = latents_for(model, len(rows), num_blocks)
    with torch.no_grad():
        logits = model(input_ids, attention_mask, latents=latents).logits
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            own = None if latents is None else latents[index : index + 1]
            if own is not None and model.config.block_size is not None:
                own = own[:, : -(-len(row) // model.config.block_size)]
            alone = model(torch.tensor([row]), latents=own).logits
            torch.testing.assert_close(logits[index, start : start + len(row)], alone[0], rtol=1e-4, atol=1e-4)


def labels_of(rows, flags, input_ids, starts):
    labels = torch.full_like(input_ids, -100)
    for index, (row, kept, start) in enumerate(zip(rows, flags, starts, strict=True)):
        labels[index, start : start + len(row)] = torch.tensor(
            [token if keep else -100 for token, keep in zip(row, kept, strict=True)]
        )
    return labels


@every_model
@few
@given(padded_rows(), st.data())
def test_a_loss_is_the_sum_of_the_rows_own(name, batch, data):
    model = model_of(name)
    rows, input_ids, attention_mask, starts = batch
    labels = labels_of(rows, data.draw(flagged(rows)), input_ids, starts)
    seeds = torch.tensor(data.draw(st.lists(st.integers(0, 999), min_size=len(rows), max_size=len(rows))))
    for noise in ({"noise_seeds": seeds}, {}):  # {}: a hash of the row
        with torch.no_grad():
            together = model(input_ids, attention_mask, labels=labels, num_items_in_batch=1, **noise)
            total = torch.zeros(())
            for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
                here = slice(index, index + 1), slice(start, start + len(row))
                own = {key: value[index : index + 1] for key, value in noise.items()}
                total += model(input_ids[here], labels=labels[here], num_items_in_batch=1, **own).loss
        torch.testing.assert_close(together.loss, total, rtol=1e-4, atol=1e-3)


@every_model
@few
@given(padded_rows(), st.integers(1, 8), bounds, draws, draws, st.data())
def test_a_bound_belongs_to_the_row_and_a_row_without_labels_costs_nothing(
    name, batch, num_steps, bound, num_samples, num_orders, data
):
    model = model_of(name)
    rows, input_ids, attention_mask, starts = batch
    labels = labels_of(rows, data.draw(flagged(rows)), input_ids, starts)
    if all_tokens := data.draw(st.booleans()):
        labels = input_ids.masked_fill(attention_mask == 0, -100)
    kwargs = {"bound": bound, "num_steps": num_steps, "batch_size": data.draw(st.integers(1, 5))}
    kwargs |= {"num_samples": num_samples, "num_orders": num_orders}
    generators = [seeded(index) for index in range(len(rows))]
    together = nelbo(model, input_ids, None if all_tokens else labels, attention_mask, generator=generators, **kwargs)
    assert together.num_tokens.tolist() == (labels != -100).sum(-1).tolist()
    if num_samples == 1:
        assert (together.kl >= 0).all() and (together.reconstruction >= 0).all()
        torch.testing.assert_close(together.nelbo, together.reconstruction + together.kl)
    assert (together.nelbo[together.num_tokens == 0] == 0).all()
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        here = slice(index, index + 1), slice(start, start + len(row))
        alone = nelbo(model, input_ids[here], labels[here], generator=[seeded(index)], **kwargs)
        torch.testing.assert_close(together.nelbo[index], alone.nelbo[0], rtol=1e-4, atol=1e-3)
        errors = together.standard_error[index], alone.standard_error[0]
        torch.testing.assert_close(*errors, rtol=1e-3, atol=1e-3, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds whose value is known
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probability(model, row, masked, revealed):
    x_t = torch.tensor([row])
    x_t[0, masked] = MASK
    log_probabilities = model(x_t).logits.double().log_softmax(-1)[0]
    return sum(log_probabilities[position, row[position]].item() for position in revealed)


@pytest.mark.parametrize("name", ["whole, no latent", "autoregressive"])
@few
@given(st.lists(digit, min_size=1, max_size=6), bounds, draws, st.data())
def test_one_step_without_a_latent_is_exact(name, row, bound, num_samples, data):
    model = model_of(name)
    kept = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    scored = [position for position, keep in enumerate(kept) if keep]
    labels = torch.tensor([[token if keep else -100 for token, keep in zip(row, kept, strict=True)]])
    if model.config.block_size is None:
        exact = -log_probability(model, row, scored, scored)
    else:  # a block is one token, which sees those before it
        exact = -sum(log_probability(model, row[: position + 1], [position], [position]) for position in scored)
    output = nelbo(model, torch.tensor([row]), labels, bound=bound, num_steps=1, num_samples=num_samples)
    assert (
        output.kl == 0
        and output.nelbo.item() == pytest.approx(exact, rel=1e-4, abs=1e-4)
        and output.standard_error.item() == 0
    )


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


@every_model
@few
@given(
    padded_rows(
        st.lists(st.lists(st.sampled_from([*range(10), *[MASK] * 10]), min_size=1, max_size=7), max_size=4, min_size=1)
    ),
    st.integers(1, 8),
    rules,
    st.booleans(),
)
def test_generation_fills_all_masks_and_touches_nothing_else(name, batch, num_steps, remasking, do_sample):
    model = model_of(name)
    rows, input_ids, attention_mask, starts = batch
    settings = {"num_steps": num_steps, "remasking": remasking, "do_sample": do_sample}
    settings |= {"return_dict_in_generate": True, "output_history": True}
    generators = [seeded(index) for index in range(len(rows))]
    output = model.generate(input_ids, attention_mask, generator=generators, **settings)
    open_places = (input_ids == MASK) & (attention_mask != 0)
    assert torch.equal(output.sequences[~open_places], input_ids[~open_places])
    assert torch.isin(output.sequences[open_places], torch.arange(10)).all()
    width = model.config.block_size or 7
    for index, row in enumerate(rows):
        counts = [row[start : start + width].count(MASK) for start in range(0, len(row), width)]
        passes = sum(min(num_steps, count) for count in counts)
        if model.config.prior == "learned":  # one more for every filled block with another before it
            passes += sum(count > 0 for count in counts[1:])
        assert output.num_forward_passes[index] == passes
        # What is still masked of the first block to be filled, step by step.
        first = next((number for number, count in enumerate(counts) if count), None)
        if first is not None:
            begin = starts[index] + first * width
            mine = slice(begin, min(begin + width, starts[index] + len(row)))
            n, steps = counts[first], min(num_steps, counts[first])
            left = [(state[index, mine] == MASK).sum().item() for state in output.history[:steps]]
            assert left == [n - k * n // steps for k in range(1, steps + 1)]
        alone = model.generate(
            torch.tensor([row]),
            generator=[seeded(index)],
            **(settings | {"return_dict_in_generate": False, "output_history": False}),
        )
        assert output.sequences[index, starts[index] : starts[index] + len(row)].tolist() == alone[0].tolist()


@every_model
@few
@given(padded_rows(), st.integers(1, 5), st.integers(1, 8), rules, st.booleans())
def test_a_prompt_is_kept_and_goes_on_at_the_end(name, batch, max_new_tokens, num_steps, remasking, do_sample):
    model = model_of(name)
    rows, input_ids, attention_mask, _ = batch
    settings = {"num_steps": num_steps, "max_new_tokens": max_new_tokens}
    settings |= {"remasking": remasking, "do_sample": do_sample}
    generators = [seeded(index) for index in range(len(rows))]
    filled = model.generate(input_ids, attention_mask, generator=generators, **settings)
    assert filled.shape == (len(rows), input_ids.shape[1] + max_new_tokens)
    for index, row in enumerate(rows):
        assert filled[index, -max_new_tokens - len(row) : -max_new_tokens].tolist() == row
        alone = model.generate(torch.tensor([row]), generator=[seeded(index)], **settings)[0]
        assert filled[index, -max_new_tokens:].tolist() == alone[len(row) :].tolist()
        assert torch.isin(alone, torch.arange(10)).all()
