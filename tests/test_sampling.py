"""The sampler as a unit, on logits whose answers are known on paper."""

import math

import pytest
import torch
from helpers import MASK, padded, seeded, tiny_model, uniform
from torch.utils._python_dispatch import TorchDispatchMode

from vmd_hf import VMDGenerationConfig, nelbo
from vmd_hf.sampling_vmd import (
    Sampler,
    SamplerState,
    confidence_of,
    corrector_probability,
    draw_for,
    generators_on,
    select_positions,
    warp,
)

CORRECTORS = ("cap", "rescale", "confidence")
M = 3  # the mask token of the sampler's tests; the other tokens are 0, 1, 2


def state_of(tokens, filled=(), num_steps=2, **changes):
    """The state of rows; `filled` (row, column) were masks at the start."""
    tokens = torch.tensor(tokens)
    fillable = tokens == M
    for place in filled:
        fillable[place] = True
    state = SamplerState(
        tokens=tokens,
        masked=tokens == M,
        fillable=fillable,
        num_fillable=fillable.sum(-1),
        num_steps=torch.full((len(tokens),), num_steps),
        active=torch.ones(len(tokens), dtype=torch.bool),
        probability=torch.zeros(tokens.shape),
    )
    for name, value in changes.items():
        setattr(state, name, value)
    return state


def logits_of(*probabilities):
    """(1, k, 3) logits, from the probabilities of the three tokens in each of k columns."""
    return torch.tensor([probabilities]).log() + 2


# --- random numbers --------------------------------------------------------------------------------------------------


def test_numbers_are_drawn_for_what_is_used_and_do_not_depend_on_other_columns():
    used = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    numbers = draw_for(used, torch.rand, (2,), [seeded(5), seeded(6), seeded(7)])
    assert torch.equal(numbers[0, :2], torch.rand(2, 2, generator=seeded(5)))
    assert torch.equal(numbers[2], torch.rand(3, 2, generator=seeded(7)))
    assert (numbers[~used] == 1).all()
    generator = seeded(6)
    draw_for(used[1:2], torch.rand, (2,), [generator])  # a row that is done draws nothing
    assert torch.equal(generator.get_state(), seeded(6).get_state())
    assert torch.equal(draw_for(used, torch.rand, (2,), seeded(5)), torch.rand(3, 3, 2, generator=seeded(5)))


def test_a_generator_of_another_device_seeds_one_there():
    assert generators_on(None, torch.device("cpu")) is None
    own = seeded(1)
    assert generators_on(own, torch.device("cpu")) is own
    if not torch.cuda.is_available():
        return
    device = torch.device("cuda")
    one, alone, other = (generators_on([seeded(a), seeded(b)], device) for a, b in ((1, 2), (1, 3), (4, 2)))
    assert one[0].device.type == "cuda"
    assert one[0].initial_seed() == alone[0].initial_seed() != other[0].initial_seed()
    assert one[1].initial_seed() == other[1].initial_seed()
    given = seeded(1)
    assert generators_on(given, device).initial_seed() != generators_on(given, device).initial_seed()


# --- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, [25 / 38, 9 / 38, 4 / 38]),  # squares of the probabilities
        ({"top_k": 2}, [0.625, 0.375, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0]),
        ({"temperature": 0.5, "top_p": 0.6}, [1, 0, 0]),  # 25/38 > 0.6 > 0.5: temperature comes first
        ({"temperature": 1.0, "top_k": 5, "top_p": 1.0}, [0.5, 0.3, 0.2]),
    ],
)
def test_warp(settings, expected):
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log() + 3  # logits know their probabilities up to a constant
    warped = warp(logits, VMDGenerationConfig(do_sample=True, **settings))
    torch.testing.assert_close(warped.softmax(-1), torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("top_prob", 0.3),
        ("top_prob_margin", 0.2),
        ("entropy", 0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)),
    ],
)
def test_confidence(rule, expected):
    probabilities = torch.tensor([[0.3, 0.0, 0.5, 0.2], [0.0, 0.0, 1.0, 0.0]])
    confidence = confidence_of(probabilities.log(), torch.tensor([0, 2]), rule)  # the first is not the most probable
    certain = 0.0 if rule == "entropy" else 1.0
    torch.testing.assert_close(confidence, torch.tensor([expected, certain]))


def test_selected_positions_are_masked_and_the_most_confident_and_ties_go_from_left_to_right():
    confidence = torch.tensor(
        [
            [0.9, 0.1, 0.5, 0.3],
            [0.2, 0.2, 0.2, 0.2],
            [0.1, 0.2, 0.3, 0.4],
            [0.1, 0.2, 0.3, 0.4],
            [0.1, 0.2, 0.3, 0.4],
        ]
    )
    masked = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    selected = select_positions(confidence, masked, torch.tensor([2, 2, 0, 3, 1]))
    expected = [[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    assert selected.int().tolist() == expected


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_probabilities_of_masking_again_are_those_of_the_paper(strength):
    # Of eight tokens: 2 to 4, 4 to 7, 6 to 8 and 0 to 1 revealed.
    revealed = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    probability = torch.tensor([[0.2, 0.7, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.3, 0.4], [0.0] * 4])
    before, after, total = torch.tensor([2, 4, 6, 0]), torch.tensor([4, 7, 8, 1]), torch.tensor([8, 8, 8, 8])
    sigma_max = [1.0, 0.25, 0.0, 0.0]  # min(1, 4/2), 1/4, 0/6; nothing is revealed in the last row

    def weigh(factors):
        rows = zip(factors, revealed.tolist(), strict=True)
        return torch.tensor([[f * r for f, r in zip(row, which, strict=True)] for row, which in rows])

    low, high = math.exp(-0.2), math.exp(-0.6)
    expected = {
        "cap": weigh([[min(strength, value)] * 4 for value in sigma_max]),
        "rescale": weigh([[strength * value] * 4 for value in sigma_max]),
        "confidence": weigh(
            [
                [strength * low / (low + high), 0, 0, strength * high / (low + high)],
                [strength * 0.25 / 4] * 4,
                [0.0] * 4,
                [0.0] * 4,
            ]
        ),
    }
    for corrector in CORRECTORS:
        config = VMDGenerationConfig(corrector=corrector, corrector_strength=strength)
        sigma = corrector_probability(revealed, probability, before, after, total, config)
        torch.testing.assert_close(sigma, expected[corrector])


# --- a step ----------------------------------------------------------------------------------------------------------


def test_masked_columns_come_first_from_left_to_right_and_rows_that_are_done_have_none():
    state = state_of([[0, M, 1, M], [M, M, 2, 2], [1, 1, 1, 1], [0, M, M, M]])
    state.active = torch.tensor([True, True, True, False])
    state.look_at_masked(3)
    assert [row[:count] for row, count in zip(state.columns.tolist(), (2, 2, 0, 3), strict=True)] == [
        [1, 3],
        [0, 1],
        [],
        [1, 2, 3],
    ]
    assert state.candidates.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


# Four masks in two steps: the first reveals two. Columns 0, 1, 2 and 4; column 3 is given.
PROBABILITIES = [0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.48, 0.04, 0.48], [0.1, 0.3, 0.6]
PREDICTED = logits_of(*PROBABILITIES)
ENTROPIES = [-sum(p * math.log(p) for p in row) for row in PROBABILITIES]  # 1.03, 0.39, 0.83, 0.90


@pytest.mark.parametrize(
    "rule, confidence, revealed",
    [
        ("top_prob", [0.5, 0.9, 0.48, 0.6], [1, 3]),
        ("top_prob_margin", [0.2, 0.85, 0.0, 0.3], [1, 3]),
        ("entropy", [-value for value in ENTROPIES], [1, 2]),
        ("left_to_right", [0.0, -1.0, -2.0, -4.0], [0, 1]),
    ],
)
def test_a_step_reveals_the_most_confident_tokens(rule, confidence, revealed):
    state = state_of([[M, M, M, 1, M]])
    state.look_at_masked(4)
    step = Sampler(VMDGenerationConfig(remasking=rule))(PREDICTED, state, 1)
    assert step.tokens.tolist() == [[0, 1, 0, 2]]
    torch.testing.assert_close(step.confidence, torch.tensor([confidence]))
    assert step.revealed[0].nonzero().flatten().tolist() == revealed
    state.reveal(step, M)
    expected = [M, M, M, 1, M]
    for column, token, index in ((0, 0, 0), (1, 1, 1), (2, 0, 2), (4, 2, 3)):
        if index in revealed:
            expected[column] = token
    assert state.tokens.tolist() == [expected] and torch.equal(state.masked, state.tokens == M)
    # The second and last step reveals the rest, wherever it is.
    state.look_at_masked(2)
    state.reveal(Sampler(VMDGenerationConfig(remasking=rule))(PREDICTED[:, :2], state, 2), M)
    assert not state.masked.any() and state.tokens[0, 3] == 1


@pytest.mark.parametrize("threshold, revealed", [(0.55, [1, 3]), (0.4, [0, 1, 2, 3]), (0.95, [1])])
def test_a_threshold_reveals_what_exceeds_it_and_at_least_one(threshold, revealed):
    state = state_of([[M, M, M, 1, M]], num_steps=4)
    state.look_at_masked(4)
    step = Sampler(VMDGenerationConfig(confidence_threshold=threshold))(PREDICTED, state, 1)
    assert step.revealed[0].nonzero().flatten().tolist() == revealed


def test_a_row_that_is_done_stays_as_it_is():
    state = state_of([[M, M], [M, M]], num_steps=1, active=torch.tensor([True, False]))
    state.look_at_masked(2)
    step = Sampler(VMDGenerationConfig())(uniform(2, 2, 3), state, 1)
    assert step.revealed.tolist() == [[True, True], [False, False]]
    assert (step.confidence[1] == -torch.inf).all()
    state.reveal(step, M)
    assert state.tokens[1].tolist() == [M, M] and state.masked.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("rule", ["random", "draws"])
def test_every_token_and_every_order_is_drawn_with_its_probability(rule):
    rows = 3000
    state = state_of([[M, M]] * rows)
    state.look_at_masked(2)
    sampler = Sampler(VMDGenerationConfig(do_sample=True, remasking="random"), generator=seeded(0))
    step = sampler(logits_of([0.7, 0.2, 0.1], [0.7, 0.2, 0.1]).expand(rows, -1, -1), state, 1)
    if rule == "random":  # one of two is revealed
        frequency, probability = step.revealed[:, 0].double().mean(), 0.5
        assert (step.revealed.sum(-1) == 1).all()
    else:
        frequency, probability = (step.tokens == 1).double().mean(), 0.2
    assert abs(frequency - probability) < 4 * math.sqrt(probability * (1 - probability) / rows)


def test_a_corrector_masks_again_and_as_many_more_are_revealed():
    # Two of four were filled; at the third of four steps sigma_max = (4 - 3) / 2 = 1/2, with strength 1.
    rows = 2000
    state = state_of([[0, 1, M, M]] * rows, [(slice(None), 0), (slice(None), 1)], num_steps=4)
    state.look_at_masked(2)
    sampler = Sampler(VMDGenerationConfig(corrector="rescale", corrector_strength=1.0), generator=seeded(0))
    step = sampler(uniform(rows, 2, 3), state, 3)
    again = step.remasked.sum(-1)
    assert not step.remasked[:, 2:].any()
    assert torch.equal(step.revealed.sum(-1), (1 + again).clamp(max=2))  # three filled, or as many as there are masks
    assert abs(step.remasked[:, :2].double().mean() - 0.5) < 4 * 0.5 / math.sqrt(2 * rows)
    state.reveal(step, M)
    assert torch.equal(state.masked, state.tokens == M)


def test_a_joint_distribution_may_take_the_place_of_independent_tokens():
    class Equal(Sampler):
        """All tokens of a row are the same, drawn from the marginal, which all have."""

        def draw_tokens(self, logits, state):
            return torch.multinomial(logits[:, 0].softmax(-1), 1, generator=self.generator).expand(logits.shape[:2])

    state = state_of([[M] * 4] * 50, num_steps=1)
    state.look_at_masked(4)
    logits = logits_of(*[[0.5, 0.3, 0.2]] * 4).expand(50, -1, -1)
    step = Equal(VMDGenerationConfig(), generator=seeded(0))(logits, state, 1)
    state.reveal(step, M)
    assert (state.tokens == state.tokens[:, :1]).all() and len(state.tokens.unique()) == 3
    torch.testing.assert_close(step.confidence, torch.tensor([0.5, 0.3, 0.2])[step.tokens])


# --- rules of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 4], ids=["whole", "blocks"])
def model(request):
    groups = [[i % 4 for i in range(16)]]
    return tiny_model(block_size=request.param, position_groups=groups)


@pytest.mark.parametrize("side", ["left", "right"])
def test_left_to_right_reveals_the_leftmost_masks(model, side):
    ids, mask = padded([[MASK, 1, MASK, MASK, 2, MASK, MASK], [MASK, MASK]], side)
    output = model.generate(
        ids, mask, remasking="left_to_right", generator=seeded(0), return_dict_in_generate=True, output_history=True
    )
    for state in output.history:
        columns = ((state == MASK) & (mask == 1)).int()
        first, second = (((ids == MASK) & (mask == 1) & (state != MASK))[row].nonzero() for row in (0, 1))
        for row, revealed in enumerate((first, second)):
            left = columns[row].nonzero()
            assert not len(left) or not len(revealed) or revealed.max() < left.min()
    assert [int((state == MASK)[mask == 1].sum()) for state in output.history][-1] == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rule_of_ones_own_sees_where_it_is_and_decides(model, side):
    """From right to left by a rule, in rows padded on either side, continued and with a second step of history."""
    calls = []

    def right_to_left(candidates):
        sequences = candidates.history[-1]
        at = sequences[candidates.rows, candidates.columns]
        assert (at[candidates.masked] == MASK).all()
        assert candidates.logits.shape == (*candidates.tokens.shape, 12)
        assert torch.equal(candidates.logits.argmax(-1)[candidates.masked], candidates.tokens[candidates.masked])
        calls.append([state.clone() for state in candidates.history])
        return candidates.columns

    ids, mask = padded([[MASK, 1, MASK, MASK, 2], [MASK, MASK]], side)
    output = model.generate(
        ids,
        mask,
        max_new_tokens=3,
        remasking=right_to_left,
        generator=seeded(0),
        return_dict_in_generate=True,
        output_history=True,
    )
    size = model.config.block_size or 100
    for row, masks, start in ((0, [0, 2, 3, 5, 6, 7], 0), (1, [3, 4, 5, 6, 7], 3)):
        order = []
        for earlier, later in zip(calls[-1], output.history, strict=True):
            order += ((earlier[row] == MASK) & (later[row] != MASK)).nonzero().flatten().tolist()
        blocks = sorted({(column - start) // size for column in masks})
        expected = [[c for c in reversed(masks) if (c - start) // size == block] for block in blocks]
        assert order == [column for block in expected for column in block]
    assert [len(history) for history in calls] == list(range(1, len(calls) + 1))
    assert all(torch.equal(a, b) for a, b in zip(calls[-1][1:], output.history[:-1], strict=True))


def test_a_rule_of_ones_own_equals_the_rule_by_name_and_may_have_a_threshold(model):
    ids, mask = padded([[MASK, 1, MASK, MASK, 2, MASK, MASK], [MASK, MASK]])

    def top_prob(candidates):
        return confidence_of(candidates.logits, candidates.tokens, "top_prob")

    for settings in ({}, {"num_steps": 2}, {"confidence_threshold": 0.5}):
        settings = settings | {"return_dict_in_generate": True, "output_confidences": True}
        expected = model.generate(ids, mask, generator=seeded(0), remasking="top_prob", **settings)
        output = model.generate(ids, mask, generator=seeded(0), remasking=top_prob, **settings)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.confidences, expected.confidences)
        assert torch.equal(output.num_forward_passes, expected.num_forward_passes)


def test_a_rule_that_returns_another_shape_is_an_error(model):
    with pytest.raises(ValueError, match=r"remasking must return a confidence for each position, of shape \(1, 3\)"):
        model.generate(torch.tensor([[MASK, MASK, MASK]]), remasking=lambda candidates: candidates.logits)


# --- devices ---------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes the host wait for a device: scalars, and shapes that depend on values. (Moving whole
    tensors is seen by no dispatch mode where all are on one device.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{function} in a step")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_steps": 2, "do_sample": True, "remasking": "random", "resample_latents": True},
        {"num_steps": 2, "do_sample": True, "temperature": 0.5, "top_k": 3, "remasking": "left_to_right"},
        {"num_steps": 3, "corrector": "confidence", "guidance_scale": 2.0, "output_confidences": True},
        {"num_steps": 2, "remasking": "entropy", "output_history": True, "cache_implementation": "static"},
    ],
)
def test_no_step_waits_for_the_device(model, settings, monkeypatch):
    fill = type(model)._fill_blocks

    def without_waiting(self, *args):
        with NoWaiting():
            fill(self, *args)

    monkeypatch.setattr(type(model), "_fill_blocks", without_waiting)
    ids = torch.tensor([[1, MASK, 3, 4, 5, MASK, MASK], [MASK, MASK, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]])
    output = model.generate(ids, return_dict_in_generate=True, **settings)
    assert not (output.sequences == MASK).any()


def test_what_a_bert_tokenizer_returns_is_taken(model):
    """Also by `nelbo`."""
    ids = torch.tensor([[1, MASK, MASK]])
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, generator=seeded(0))
    assert torch.equal(model.generate(**inputs, generator=seeded(0)), expected)
    bound = nelbo(model, **inputs | {"input_ids": expected}, generator=seeded(0)).nelbo
    assert torch.equal(bound, nelbo(model, expected, generator=seeded(0)).nelbo)
