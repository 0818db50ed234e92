import math
from functools import partial
from itertools import product

import helpers
import pytest
import torch
from helpers import StopOnce, normal, seeded, unpadded
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
)

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, VMDGenerateOutput, VMDGenerationConfig
from vmd_hf.data.text import character_tokenizer
from vmd_hf.generation_configuration_vmd import REMASKING_RULES
from vmd_hf.generation_vmd import EndOfText, PrefixStreamer, prepare_canvas
from vmd_hf.sampling_vmd import confidence_of, draw, select_positions, warp

MASK, PAD = 7, 8
SURE_RULES = ("top_prob", "top_prob_margin", "entropy")
# Four, two, five and no masks.
ROWS = [[MASK, 1, MASK, MASK, 2, MASK], [3, MASK, MASK], [MASK, MASK, 6, MASK, MASK, MASK], [0, 4]]


def small_model(seed=0, **changes):
    """A model with large random weights, so that every token, position and latent dimension matters."""
    settings = {
        "vocab_size": 9,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
        "position_embedding_type": "learned",
        "latent_size": 3,
        "conditioning_size": 8,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
    }
    model = VMDForMaskedDiffusion(VMDConfig(**(settings | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5, generator=generator)
    return model


@pytest.fixture(scope="module", params=["learned", "rotary"])
def model(request):
    return small_model(seed=2 if request.param == "rotary" else 0, position_embedding_type=request.param)


padded = partial(helpers.padded, fill=PAD)


def record_passes(model):
    """Every forward pass of the denoiser while the returned list is alive: its rows and what the latents do."""
    calls = []

    def before(module, args, kwargs):
        calls.append({"input_ids": args[0] if args else kwargs["input_ids"], "modulation": kwargs["modulation"]})

    return calls, model.model.register_forward_pre_hook(before, with_kwargs=True)


@torch.no_grad()
def assert_latents(model, call, latents):
    torch.testing.assert_close(call["modulation"], model.model.modulation_of(latents[:, None]))


@torch.no_grad()
def fill_greedily(model, row, latents, rule, num_steps=None, threshold=1.0):
    """One row, one position at a time in plain Python. Returns the sequence after every step."""
    row = torch.tensor(row)
    num_masks = int((row == MASK).sum())
    num_steps = min(num_steps or num_masks, num_masks)
    history = []
    filled = 0
    while filled < num_masks:
        probabilities = model(row[None], latents=latents[None]).logits[0].double().softmax(-1)
        scores = {}
        for position in (row == MASK).nonzero().flatten().tolist():
            best, second, *_ = sorted(probabilities[position].tolist(), reverse=True)
            scores[position] = {
                "top_prob": best,
                "top_prob_margin": best - second,
                "entropy": sum(p * math.log(p) for p in probabilities[position].tolist() if p > 0),
            }[rule]
        scheduled = (len(history) + 1) * num_masks // num_steps - filled
        count = max(scheduled, 1, sum(score > threshold for score in scores.values()))
        for position in sorted(scores, key=scores.get, reverse=True)[:count]:
            row[position] = probabilities[position].argmax()
        filled += count
        history.append(row.tolist())
    return history


# --- the pieces ------------------------------------------------------------------------------------------------------


def test_canvas_without_new_tokens_is_a_copy_of_the_input():
    ids, mask = padded([[1, MASK], [2]])
    canvas, canvas_mask = prepare_canvas(ids, mask, None, MASK)
    assert torch.equal(canvas, ids) and torch.equal(canvas_mask, mask)
    assert canvas.data_ptr() != ids.data_ptr()


def test_canvas_with_new_tokens_ends_all_prompts_in_one_column():
    ids = torch.tensor([[1, 2, 3], [4, 5, PAD], [PAD, 6, PAD]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0]])
    canvas, canvas_mask = prepare_canvas(ids, mask, 2, MASK)
    assert canvas.tolist() == [[1, 2, 3, MASK, MASK], [PAD, 4, 5, MASK, MASK], [PAD, PAD, 6, MASK, MASK]]
    assert canvas_mask.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("sampler", [torch.rand, torch.randn])
def test_draw_takes_each_row_from_its_own_generator(sampler):
    numbers = draw(sampler, [2, 0, 3], (4,), [seeded(5), seeded(6), seeded(7)], torch.device("cpu"))
    expected = torch.cat([sampler((2, 4), generator=seeded(5)), sampler((3, 4), generator=seeded(7))])
    assert torch.equal(numbers, expected)


def test_draw_takes_the_batch_from_one_generator():
    numbers = draw(torch.rand, [2, 1], (), seeded(5), torch.device("cpu"))
    assert torch.equal(numbers, torch.rand(3, generator=seeded(5)))


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


def test_selected_positions_are_masked_and_the_surest_and_ties_go_from_left_to_right():
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


@pytest.mark.parametrize(
    "eos, pad, expected",
    [
        (2, PAD, [[2, 1, 0, 2, PAD, PAD], [1, 1, 0, 5, 5, 2], [0, 1, 2, PAD, PAD, PAD]]),
        ([5, 2], PAD, [[2, 1, 0, 2, PAD, PAD], [1, 1, 0, 5, PAD, PAD], [0, 1, 2, PAD, PAD, PAD]]),
        ([5, 2], None, [[2, 1, 0, 2, 5, 5], [1, 1, 0, 5, 5, 5], [0, 1, 2, 5, 5, 5]]),
        (None, PAD, [[2, 1, 0, 2, 3, 2], [1, 1, 0, 5, 5, 2], [0, 1, 2, 2, 5, 4]]),
    ],
)
def test_padding_after_the_first_end_of_sequence_among_new_tokens(eos, pad, expected):
    sequences = torch.tensor([[2, 1, 0, 2, 3, 2], [1, 1, 0, 5, 5, 2], [0, 1, 2, 2, 5, 4]])
    config = VMDGenerationConfig(max_new_tokens=4, eos_token_id=eos, pad_token_id=pad)
    assert pad_after_eos(sequences, config).tolist() == expected


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.puts = []
        self.ends = 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ends += 1


def test_prefix_streamer_sends_what_is_final_in_every_row_and_only_once():
    collector = Collector()
    streamer = PrefixStreamer(collector)
    sequences = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])
    masked = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]).bool()
    streamer.put(sequences, masked)  # column 1 is open in the first row
    masked[0, 2] = False
    streamer.put(sequences, masked)  # nothing new: column 1 is still open
    masked[0, 1] = False
    streamer.put(sequences, masked)  # column 2 is open in the second row
    masked[:] = False
    streamer.put(sequences, masked)
    assert [put.tolist() for put in collector.puts] == [[[0], [4]], [[1], [5]], [[2, 3], [6, 0]]]


# --- what is filled, and in how many passes --------------------------------------------------------------------------


FILLING_SETTINGS = [
    {},
    {"num_steps": 1},
    {"num_steps": 3, "do_sample": True},
    {"num_steps": 2, "do_sample": True, "temperature": 2.0, "top_k": 3, "top_p": 0.9},
    {"resample_latents": True, "num_steps": 4},
]
THRESHOLD_SETTINGS = [{"confidence_threshold": 0.5}, {"confidence_threshold": 0.5, "do_sample": True, "num_steps": 2}]


@pytest.mark.parametrize(
    "settings",
    [
        *(settings | {"remasking": rule} for rule in REMASKING_RULES for settings in FILLING_SETTINGS),
        *(settings | {"remasking": rule} for rule in REMASKING_RULES[1:3] for settings in THRESHOLD_SETTINGS),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_mask_is_filled_and_nothing_else_changes(model, settings, side):
    ids, mask = padded(ROWS, side, width=8, fill=MASK)  # mask tokens in the padding must stay, too
    before = ids.clone()
    output = model.generate(ids, mask, generator=seeded(0), **settings)
    fillable = (ids == MASK) & (mask == 1)
    assert output.dtype == torch.int64 and output.shape == ids.shape
    assert torch.equal(ids, before)
    assert torch.equal(output[~fillable], ids[~fillable])
    assert output[fillable].max() < MASK  # neither the mask nor the pad token


@pytest.mark.parametrize("remasking", REMASKING_RULES)
@pytest.mark.parametrize("num_steps", [None, 1, 2, 3, 4, 100])
def test_forward_passes_are_counted_for_each_row(model, remasking, num_steps):
    ids, mask = padded(ROWS)
    calls, handle = record_passes(model)
    output = model.generate(ids, mask, num_steps=num_steps, remasking=remasking, return_dict_in_generate=True)
    handle.remove()
    assert isinstance(output, VMDGenerateOutput)
    expected = [min(num_steps or 100, masks) for masks in (4, 2, 5, 0)]
    assert output.num_forward_passes.tolist() == expected
    assert len(calls) == max(expected)
    # A row is in as many of the passes as were counted for it: a finished row costs nothing.
    assert [len(call["input_ids"]) for call in calls] == [
        sum(passes > step for passes in expected) for step in range(max(expected))
    ]


def test_a_batch_without_masks_costs_no_pass(model):
    calls, handle = record_passes(model)
    output = model.generate(torch.tensor([[1, 2], [3, 4]]), return_dict_in_generate=True, output_history=True)
    handle.remove()
    assert output.sequences.tolist() == [[1, 2], [3, 4]]
    assert output.num_forward_passes.tolist() == [0, 0]
    assert calls == [] and output.history == ()


@pytest.mark.parametrize(
    "num_steps, masks_left",
    [
        # after step k of T a row of n masks has floor(k n / T) filled
        (2, [[2, 1, 3], [0, 0, 0]]),  # 4: 2, 4; 2 in 2: 1, 2; 5: 2, 5
        (3, [[3, 1, 4], [2, 0, 2], [0, 0, 0]]),  # 4: 1, 2, 4; 2: 1, 2; 5: 1, 3, 5
        (None, [[3, 1, 4], [2, 0, 3], [1, 0, 2], [0, 0, 1], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("remasking", REMASKING_RULES)
def test_schedule(model, num_steps, masks_left, remasking):
    ids, mask = padded(ROWS[:3])
    output = model.generate(
        ids, mask, num_steps=num_steps, remasking=remasking, return_dict_in_generate=True, output_history=True
    )
    assert [(state == MASK).sum(-1).tolist() for state in output.history] == masks_left
    assert torch.equal(output.history[-1], output.sequences)
    for earlier, later in zip(output.history[:-1], output.history[1:], strict=True):
        assert torch.equal(earlier[earlier != MASK], later[earlier != MASK])  # what is revealed stays


def test_three_masks_in_two_steps_are_one_and_then_two(model):
    output = model.generate(torch.full((1, 3), MASK), num_steps=2, return_dict_in_generate=True, output_history=True)
    assert [(state == MASK).sum().item() for state in output.history] == [2, 0]


def test_history_is_kept_on_request_only(model):
    assert model.generate(torch.tensor([[MASK]]), return_dict_in_generate=True).history is None


# --- what is predicted -----------------------------------------------------------------------------------------------


def test_one_greedy_step_is_the_argmax_of_the_forward_pass(model):
    ids, mask = padded(ROWS)
    latents = normal(4, 3)
    logits = model(input_ids=ids, attention_mask=mask, latents=latents).logits
    masked = (ids == MASK) & (mask == 1)
    expected = torch.where(masked, logits.argmax(-1), ids)
    assert torch.equal(model.generate(ids, mask, latents=latents, num_steps=1), expected)


@pytest.mark.parametrize("rule", SURE_RULES)
@pytest.mark.parametrize("num_steps", [None, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_batches_are_their_rows_filled_by_a_plain_loop(model, rule, num_steps, side):
    rows = ROWS * 6
    ids, mask = padded(rows, side, width=7)
    latents = normal(len(rows), 3, seed=1)
    output = model.generate(ids, mask, latents=latents, remasking=rule, num_steps=num_steps)
    expected = [
        [row, *fill_greedily(model, row, z, rule, num_steps)][-1] for row, z in zip(rows, latents, strict=True)
    ]
    assert unpadded(output, mask) == expected


def test_the_rules_differ(model):
    # or the test above could not tell one from another
    rows = ROWS * 6
    first, second, third = (
        [fill_greedily(model, row, z, rule) for row, z in zip(rows, normal(len(rows), 3, seed=1), strict=True)]
        for rule in SURE_RULES
    )
    assert first != second and second != third and first != third


@pytest.mark.parametrize("rule", ["top_prob", "top_prob_margin"])
@pytest.mark.parametrize("threshold, num_steps", [(0.4, None), (0.6, None), (0.6, 2)])
def test_confidence_threshold_reveals_all_that_exceed_it(model, rule, threshold, num_steps):
    ids, mask = padded(ROWS)
    latents = normal(4, 3, seed=2)
    output = model.generate(
        ids,
        mask,
        latents=latents,
        remasking=rule,
        confidence_threshold=threshold,
        num_steps=num_steps,
        return_dict_in_generate=True,
    )
    histories = [
        fill_greedily(model, row, z, rule, num_steps, threshold) for row, z in zip(ROWS, latents, strict=True)
    ]
    assert output.num_forward_passes.tolist() == [len(history) for history in histories]
    assert unpadded(output.sequences, mask) == [
        [row, *history][-1] for row, history in zip(ROWS, histories, strict=True)
    ]


@pytest.mark.parametrize(
    "threshold, num_steps, passes",
    [(1e-6, None, [1, 1, 1, 0]), (1 - 1e-7, None, [4, 2, 5, 0]), (1 - 1e-7, 3, [3, 2, 3, 0])],
)
def test_extreme_confidence_thresholds(model, threshold, num_steps, passes):
    ids, mask = padded(ROWS)
    output = model.generate(
        ids, mask, confidence_threshold=threshold, num_steps=num_steps, return_dict_in_generate=True
    )
    assert output.num_forward_passes.tolist() == passes


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 3}],
)
def test_sampled_tokens_have_the_probabilities_of_the_distribution(settings):
    model, num_samples = small_model(seed=3), 4000
    row, latents = torch.tensor([[1, MASK, 5]]), normal(1, 3)
    probabilities = model(input_ids=row, latents=latents).logits[0, 1].double().softmax(-1)
    probabilities = probabilities ** (1 / settings.get("temperature", 1.0))
    probabilities = probabilities / probabilities.sum()
    kept, mass = 0, 0.0
    order = probabilities.argsort(descending=True).tolist()
    for token in order:
        if kept == settings.get("top_k", 9) or mass >= settings.get("top_p", 1.0):
            probabilities[token] = 0
        else:
            kept, mass = kept + 1, mass + probabilities[token].item()
    probabilities = probabilities / probabilities.sum()

    output = model.generate(
        row.expand(num_samples, 3),
        latents=latents.expand(num_samples, 3),
        do_sample=True,
        generator=seeded(0),
        **settings,
    )
    counts = torch.bincount(output[:, 1], minlength=9).double()
    expected = num_samples * probabilities
    assert counts[probabilities == 0].sum() == 0
    assert (probabilities > 0).sum() > 1
    chi_square = ((counts - expected).square() / expected)[probabilities > 0].sum()
    assert chi_square < 28  # the 99.99 % quantile of chi-square with 6 degrees of freedom is 27.9


def test_top_k_one_is_greedy_and_leaves_the_confidence_alone(model):
    # The remasking rules see the unchanged distribution: under the warped one all positions would be equally sure.
    ids, mask = padded(ROWS)
    latents = normal(4, 3)
    for rule in SURE_RULES:
        sampled = model.generate(ids, mask, latents=latents, remasking=rule, do_sample=True, top_k=1)
        assert torch.equal(sampled, model.generate(ids, mask, latents=latents, remasking=rule))


def reference_joint(model, latents, fresh_latents):
    """The exact joint of two tokens in two steps, in either order, averaged over pairs of latents: (3, 3)."""

    def conditional(row, position, z):
        ids = torch.tensor([row]).expand(1 if z is None else len(z), 2)
        return model(input_ids=ids, latents=z).logits[:, position, :3].double().softmax(-1)  # (latents, 3)

    mask = model.config.mask_token_id
    left_first, right_first = conditional([mask, mask], 0, latents), conditional([mask, mask], 1, latents)
    joint = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in product(range(3), repeat=2):
        after_left = left_first[:, a] * conditional([a, mask], 1, fresh_latents)[:, b]
        after_right = right_first[:, b] * conditional([mask, b], 0, fresh_latents)[:, a]
        joint[a, b] = (0.5 * after_left + 0.5 * after_right).mean()
    return joint


def total_variation(samples, joint):
    counts = torch.bincount(samples[:, 0] * 3 + samples[:, 1], minlength=9).view(3, 3).double()
    return 0.5 * (counts / len(samples) - joint).abs().sum().item()


@torch.no_grad()
def test_joint_distribution_without_a_latent_is_the_enumerated_one():
    model = small_model(seed=5, vocab_size=4, mask_token_id=3, pad_token_id=None, latent_size=0, num_hidden_layers=1)
    joint = reference_joint(model, None, None)
    assert joint.sum().item() == pytest.approx(1, abs=1e-9)
    independent = model(input_ids=torch.full((1, 2), 3)).logits[0, :, :3].double().softmax(-1)
    # The test has power: predicting both tokens in one step is another distribution.
    assert 0.5 * (joint - independent[0][:, None] * independent[1]).abs().sum() > 0.1

    samples = model.generate(
        torch.full((20_000, 2), 3), num_steps=2, do_sample=True, remasking="random", generator=seeded(0)
    )
    # Nine cells: the expected distance of 20,000 exact samples is below 4.5 sqrt(2 / (20000 pi) 8 / 81) = 0.008.
    assert total_variation(samples, joint) < 0.016
    one_step = model.generate(torch.full((20_000, 2), 3), num_steps=1, do_sample=True, generator=seeded(0))
    assert total_variation(one_step, independent[0][:, None] * independent[1]) < 0.016


@torch.no_grad()
def test_joint_distribution_with_one_latent_kept_or_a_fresh_one_for_each_step():
    model = small_model(seed=6, vocab_size=4, mask_token_id=3, pad_token_id=None, num_hidden_layers=1)
    model.model.modulation.weight *= 6
    z, fresh = normal(10_000, 3, seed=1), normal(10_000, 3, seed=2)
    joints = {False: reference_joint(model, z, z), True: reference_joint(model, z, fresh)}
    assert 0.5 * (joints[True] - joints[False]).abs().sum() > 0.2  # the two samplers differ
    for resample_latents, joint in joints.items():
        samples = model.generate(
            torch.full((10_000, 2), 3),
            num_steps=2,
            do_sample=True,
            remasking="random",
            resample_latents=resample_latents,
            generator=seeded(0),
        )
        assert total_variation(samples, joint) < 0.03  # the reference is an average over draws of z, too


# --- latents and generators ------------------------------------------------------------------------------------------


def test_given_latents_are_used_and_returned_and_never_scaled(model):
    ids, latents = torch.full((3, 4), MASK), normal(3, 3)
    first = model.generate(ids, latents=latents, return_dict_in_generate=True)
    second = model.generate(ids, latents=latents, latent_scale=0.1, return_dict_in_generate=True)
    assert torch.equal(first.latents, latents) and torch.equal(second.latents, latents)
    assert torch.equal(first.sequences, second.sequences)
    other = model.generate(ids, latents=-latents)
    assert not torch.equal(first.sequences, other)


def test_drawn_latents_come_from_the_generator_and_are_scaled(model):
    ids = torch.full((3, 4), MASK)
    expected = normal(3, 3, seed=4)
    for scale in (1.0, 0.5, 0.0):
        output = model.generate(ids, generator=seeded(4), latent_scale=scale, return_dict_in_generate=True)
        torch.testing.assert_close(output.latents, scale * expected)
        assert torch.equal(output.sequences, model.generate(ids, latents=scale * expected))
    # Scale 0 is the prior mean, as in a forward pass without latents.
    logits = model(input_ids=ids).logits
    assert torch.equal(model.generate(ids, generator=seeded(4), latent_scale=0.0, num_steps=1), logits.argmax(-1))


def test_drawn_latents_come_from_each_rows_own_generator(model):
    ids = torch.full((2, 4), MASK)
    output = model.generate(ids, generator=[seeded(4), seeded(9)], return_dict_in_generate=True)
    assert torch.equal(output.latents, torch.cat([normal(1, 3, seed=4), normal(1, 3, seed=9)]))


def test_one_latent_is_kept_for_all_steps_by_default(model):
    calls, handle = record_passes(model)
    output = model.generate(torch.full((2, 3), MASK), generator=seeded(0), return_dict_in_generate=True)
    handle.remove()
    assert len(calls) == 3
    for call in calls:
        assert_latents(model, call, output.latents)


def test_a_fresh_latent_is_drawn_for_each_step_of_each_row_that_is_not_finished(model):
    ids = torch.tensor([[MASK, MASK, 1], [MASK, MASK, MASK]])
    calls, handle = record_passes(model)
    output = model.generate(
        ids,
        resample_latents=True,
        latent_scale=2.0,
        generator=[seeded(4), seeded(9)],
        return_dict_in_generate=True,
    )
    handle.remove()
    streams = [
        [2 * torch.randn(1, 3, generator=generator)[0] for _ in range(3)] for generator in (seeded(4), seeded(9))
    ]
    assert_latents(model, calls[0], torch.stack([streams[0][0], streams[1][0]]))
    assert_latents(model, calls[1], torch.stack([streams[0][1], streams[1][1]]))
    assert_latents(model, calls[2], streams[1][2][None])
    assert torch.equal(output.latents, torch.stack([streams[0][1], streams[1][2]]))


RANDOM_SETTINGS = {"do_sample": True, "remasking": "random", "num_steps": 3}


def test_the_same_seed_gives_the_same_samples(model):
    ids = torch.full((8, 6), MASK)
    first, second, other = (model.generate(ids, generator=seeded(seed), **RANDOM_SETTINGS) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "settings",
    [RANDOM_SETTINGS, RANDOM_SETTINGS | {"resample_latents": True}, {"do_sample": True, "confidence_threshold": 0.5}],
)
def test_with_a_generator_for_each_row_the_batch_does_not_matter(model, settings):
    alone = [
        model.generate(torch.tensor([row]), generator=[seeded(index)], **settings)[0].tolist()
        for index, row in enumerate(ROWS)
    ]
    for order in ([0, 1, 2, 3], [2, 0], [3, 2, 1, 0], [1, 3]):
        for side in ("left", "right"):
            ids, mask = padded([ROWS[index] for index in order], side, width=7)
            output = model.generate(ids, mask, generator=[seeded(index) for index in order], **settings)
            assert unpadded(output, mask) == [alone[index] for index in order]


def test_a_model_without_a_latent_generates():
    model = small_model(latent_size=0)
    ids, mask = padded(ROWS)
    output = model.generate(ids, mask, num_steps=1, return_dict_in_generate=True)
    assert output.latents is None
    expected = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    assert torch.equal(output.sequences, torch.where((ids == MASK) & (mask == 1), expected, ids))
    sampled = model.generate(ids, mask, generator=seeded(0), resample_latents=True, **RANDOM_SETTINGS)
    assert not (sampled == MASK).any()


def test_a_model_in_half_precision_generates():
    model = small_model().to(torch.bfloat16)
    ids, mask = padded(ROWS)
    output = model.generate(ids, mask, generator=seeded(0), **RANDOM_SETTINGS)
    assert not (output == MASK).any()


# --- continuing prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SURE_RULES)
def test_prompts_are_continued_alike_alone_and_in_a_batch_padded_on_either_side(model, rule):
    prompts = [[1, 2, 3, 4], [5], [0, 6]]
    latents = normal(3, 3)
    settings = {"max_new_tokens": 5, "num_steps": 3, "remasking": rule}
    alone = [
        model.generate(torch.tensor([prompt]), latents=z[None], **settings)[0].tolist()
        for prompt, z in zip(prompts, latents, strict=True)
    ]
    expected = [[PAD] * (9 - len(row)) + row for row in alone]  # the prompts end in one column
    for side in ("left", "right"):
        ids, mask = padded(prompts, side)
        assert model.generate(ids, mask, latents=latents, **settings).tolist() == expected
    for prompt, row in zip(prompts, alone, strict=True):
        assert row[: len(prompt)] == prompt and len(row) == len(prompt) + 5
        assert max(row) < MASK


def test_an_empty_prompt_is_continued(model):
    latents = normal(2, 3)
    output = model.generate(torch.empty(2, 0, dtype=torch.long), max_new_tokens=4, latents=latents)
    assert torch.equal(output, model.generate(torch.full((2, 4), MASK), latents=latents))


def test_masks_in_a_prompt_are_filled_with_the_new_ones(model):
    latents = normal(1, 3)
    output = model.generate(
        torch.tensor([[1, MASK, 2]]), max_new_tokens=2, latents=latents, return_dict_in_generate=True
    )
    expected = model.generate(torch.tensor([[1, MASK, 2, MASK, MASK]]), latents=latents)
    assert torch.equal(output.sequences, expected)
    assert output.num_forward_passes.tolist() == [3]


def test_new_tokens_after_the_end_of_a_text_are_padding(model):
    prompts, latents = [[1, 2, 3], [4]], normal(2, 3)
    ids, mask = padded(prompts)
    settings = {"latents": latents, "max_new_tokens": 6}
    plain = model.generate(ids, mask, **settings).tolist()
    eos = plain[0][4]  # the second new token of the first row
    expected = []
    for row in plain:
        prompt, new = row[:3], row[3:]
        end = new.index(eos) + 1 if eos in new else len(new)
        expected.append(prompt + new[:end] + [PAD] * (len(new) - end))
    assert PAD in expected[0][3:]
    assert model.generate(ids, mask, eos_token_id=eos, **settings).tolist() == expected
    assert model.generate(ids, mask, eos_token_id=[eos], **settings).tolist() == expected


def test_infilling_knows_no_end_of_text(model):
    latents = normal(1, 3)
    ids = torch.full((1, 6), MASK)
    plain = model.generate(ids, latents=latents)
    assert torch.equal(model.generate(ids, latents=latents, eos_token_id=plain[0, 1].item()), plain)


# --- processors, stopping, streaming ---------------------------------------------------------------------------------


class RecordingProcessor(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


def test_logits_processors_are_respected(model):
    ids, mask = padded(ROWS)
    latents = normal(4, 3)
    plain = model.generate(ids, mask, latents=latents)
    suppressed = plain[(ids == MASK) & (mask == 1)].unique().tolist()[:3]
    processor = LogitsProcessorList([SuppressTokensLogitsProcessor(suppressed)])
    for settings in ({}, {"do_sample": True, "remasking": "random"}, {"confidence_threshold": 0.5}):
        output = model.generate(
            ids, mask, latents=latents, generator=seeded(0), logits_processor=processor, **settings
        )
        filled = output[(ids == MASK) & (mask == 1)]
        assert not torch.isin(filled, torch.tensor([*suppressed, MASK, PAD])).any()


def test_logits_processors_see_one_row_for_each_masked_position(model):
    rows = [[MASK, 1, MASK], [2, MASK, 3]]
    recorder = RecordingProcessor()
    latents = normal(2, 3)
    output = model.generate(
        torch.tensor(rows),
        latents=latents,
        logits_processor=LogitsProcessorList([recorder]),
        return_dict_in_generate=True,
        output_history=True,
    )
    (first_ids, first_scores), (second_ids, second_scores) = recorder.calls
    assert first_ids.tolist() == [rows[0], rows[0], rows[1]]
    logits = model(input_ids=torch.tensor(rows), latents=latents).logits
    torch.testing.assert_close(first_scores, torch.stack([logits[0, 0], logits[0, 2], logits[1, 1]]))
    assert second_ids.tolist() == [output.history[0][0].tolist()]
    assert second_scores.shape == (1, 9)


def test_a_stopped_row_is_left_as_it_is_and_the_others_go_on(model):
    ids, mask = padded(ROWS)
    latents = normal(4, 3)
    plain = model.generate(ids, mask, latents=latents, return_dict_in_generate=True, output_history=True)
    criterion = StopOnce(row=2, step=2)
    stopped = model.generate(
        ids,
        mask,
        latents=latents,
        stopping_criteria=StoppingCriteriaList([criterion]),
        return_dict_in_generate=True,
        output_history=True,
    )
    assert torch.equal(stopped.sequences[2], plain.history[1][2])
    assert (stopped.sequences[2] == MASK).sum() == 3
    assert torch.equal(stopped.sequences[[0, 1, 3]], plain.sequences[[0, 1, 3]])
    assert stopped.num_forward_passes.tolist() == [4, 2, 2, 0]
    assert torch.equal(torch.stack(criterion.seen), torch.stack(stopped.history))  # masks included


@pytest.mark.parametrize("settings", [{}, {"remasking": "random", "do_sample": True}, {"num_steps": 1}])
def test_streamed_pieces_make_up_the_sequence(model, settings):
    ids = torch.tensor([[1, 2, MASK, 3, MASK, MASK], [4, MASK, MASK, MASK, 5, 6]])
    collector = Collector()
    output = model.generate(ids, generator=seeded(1), streamer=collector, **settings)
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)
    assert collector.puts[0].tolist() == [[1], [4]]  # the second column is open in the second row
    assert collector.ends == 1


def test_the_prompt_is_streamed_first(model):
    collector = Collector()
    output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, generator=seeded(1), streamer=collector)
    assert collector.puts[0].tolist() == [[1, 2, 3]]
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)


def test_what_is_streamed_after_the_end_of_a_text_is_the_padding_of_the_sequence(model):
    ids, latents = torch.tensor([[1, 2, 3]]), normal(1, 3)
    eos = model.generate(ids, max_new_tokens=6, latents=latents)[0, 4].item()
    collector = Collector()
    output = model.generate(ids, max_new_tokens=6, latents=latents, eos_token_id=eos, streamer=collector)
    assert output[0, -1] == PAD
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("prompt", ["we the people", ""])
def test_transformers_streamer_yields_the_decoded_text(skip_prompt, prompt):
    tokenizer = character_tokenizer()
    model = small_model(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=32,
    )
    ids = torch.tensor([tokenizer(prompt).input_ids], dtype=torch.long).view(1, -1)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt)
    output = model.generate(ids, max_new_tokens=10, generator=seeded(0), do_sample=True, streamer=streamer)
    text = tokenizer.decode(output[0])
    assert "".join(streamer) == (text[len(prompt) :] if skip_prompt else text)
    assert text.startswith(prompt) and len(output[0]) == len(prompt) + 10


# --- settings --------------------------------------------------------------------------------------------------------

# Every field with a value that is not its default.
ALL_FIELDS = {
    "max_new_tokens": 2,
    "num_steps": 3,
    "remasking": "top_prob_margin",
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 4,
    "top_p": 0.9,
    "confidence_threshold": 0.5,
    "resample_latents": True,
    "latent_scale": 0.5,
    "corrector": None,
    "corrector_strength": 0.3,
    "guidance_scale": 1.5,
    "use_cache": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "output_history": True,
    "output_confidences": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 4,
}
WITH_CORRECTOR = {**ALL_FIELDS, "confidence_threshold": None, "corrector": "cap"}  # the two exclude each other


def public_fields(config):
    return {name: value for name, value in vars(config).items() if name[0] != "_" and name != "transformers_version"}


def test_the_fields_of_the_test_are_all_fields():
    defaults = public_fields(VMDGenerationConfig())
    assert defaults.keys() == ALL_FIELDS.keys()
    assert all(
        value not in (ALL_FIELDS[name], WITH_CORRECTOR[name]) or name in ("confidence_threshold", "corrector")
        for name, value in defaults.items()
    )


@pytest.mark.parametrize("fields", [ALL_FIELDS, WITH_CORRECTOR])
def test_every_setting_is_saved_with_the_model_and_loaded(tmp_path, fields):
    model = small_model()
    model.generation_config = VMDGenerationConfig(**fields)
    model.save_pretrained(tmp_path)
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, VMDGenerationConfig)
    assert public_fields(loaded.generation_config) == fields
    assert isinstance(loaded.generate(torch.tensor([[1]]), generator=seeded(0)), VMDGenerateOutput)


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_each_setting_survives_alone(name, tmp_path):
    needed = {
        "temperature": "do_sample",
        "top_k": "do_sample",
        "top_p": "do_sample",
        "output_history": "return_dict_in_generate",
        "output_confidences": "return_dict_in_generate",
    }
    fields = {name: ALL_FIELDS[name]} | ({needed[name]: True} if name in needed else {})
    VMDGenerationConfig(**fields).save_pretrained(tmp_path)
    assert public_fields(VMDGenerationConfig.from_pretrained(tmp_path)) == public_fields(VMDGenerationConfig(**fields))


def test_settings_that_undo_a_models_own_defaults_survive(tmp_path):
    model = small_model(objective="per_step", eos_token_id=3)
    assert model.generation_config.resample_latents and model.generation_config.eos_token_id == 3
    model.generation_config.update(resample_latents=False, eos_token_id=None, pad_token_id=None)
    model.save_pretrained(tmp_path)
    settings = VMDForMaskedDiffusion.from_pretrained(tmp_path).generation_config
    assert public_fields(settings) == public_fields(VMDGenerationConfig())


def test_a_folder_without_saved_settings_gives_the_defaults_of_the_model(tmp_path):
    model = small_model(objective="per_step")
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path)
    assert public_fields(loaded.generation_config) == public_fields(model.generation_config)
    assert loaded.generation_config.resample_latents


def test_fields_of_the_models_config_may_be_given_on_loading(tmp_path):
    model = small_model()
    model.generation_config.num_steps = 3
    model.save_pretrained(tmp_path)
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path, kl_weight=0.25)
    assert (loaded.config.kl_weight, loaded.generation_config.num_steps) == (0.25, 3)


def test_a_generation_config_may_be_given_on_loading(tmp_path):
    small_model().save_pretrained(tmp_path)
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path, generation_config=VMDGenerationConfig(num_steps=2))
    assert loaded.generation_config.num_steps == 2


@pytest.mark.parametrize(
    "objective, latent_size, resample_latents",
    [("vmd", 3, False), ("per_sample", 3, False), ("per_step", 3, True), ("per_step", 0, False)],
)
def test_a_models_defaults_are_the_sampler_of_its_objective(objective, latent_size, resample_latents):
    model = small_model(objective=objective, latent_size=latent_size, eos_token_id=[2, 3])
    expected = public_fields(VMDGenerationConfig()) | {
        "resample_latents": resample_latents,
        "eos_token_id": [2, 3],
        "pad_token_id": PAD,
    }
    assert public_fields(model.generation_config) == expected


def test_given_settings_replace_those_of_the_model_and_keywords_override_both():
    model = small_model()
    model.generation_config = VMDGenerationConfig(num_steps=1, pad_token_id=PAD)
    given = VMDGenerationConfig(num_steps=2, return_dict_in_generate=True)
    before = public_fields(model.generation_config), public_fields(given)
    ids = torch.full((1, 5), MASK)

    def passes(**settings):
        return model.generate(ids, **settings).num_forward_passes.item()

    assert passes(return_dict_in_generate=True) == 1
    assert passes(generation_config=given) == 2
    assert passes(generation_config=given, num_steps=3) == 3
    assert passes(generation_config=given, num_steps=None) == 5
    assert (public_fields(model.generation_config), public_fields(given)) == before


def test_given_settings_without_special_tokens_take_those_of_the_model():
    model, latents = small_model(), normal(1, 3)
    ids = torch.tensor([[1, 2, 3]])
    eos = model.generate(ids, max_new_tokens=6, latents=latents)[0, 4].item()
    model.generation_config.eos_token_id = eos
    expected = model.generate(ids, max_new_tokens=6, latents=latents)
    assert expected[0, -1] == PAD
    output = model.generate(ids, generation_config=VMDGenerationConfig(max_new_tokens=6), latents=latents)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2}, "num_beams"),
        ({"max_length": 9}, "max_length"),
        ({"to_dict": 1}, "to_dict"),  # an attribute, but no setting
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1.5}, "num_steps"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"remasking": "confidence"}, "remasking"),
        ({"temperature": 0.5}, "temperature needs do_sample"),
        ({"top_k": 5}, "top_k needs do_sample"),
        ({"top_p": 0.5}, "top_p needs do_sample"),
        ({"do_sample": True, "temperature": 0}, "temperature"),
        ({"do_sample": True, "top_k": 0}, "top_k"),
        ({"do_sample": True, "top_p": 1.1}, "top_p"),
        ({"confidence_threshold": 1.0}, "confidence_threshold"),
        ({"confidence_threshold": 0.5, "remasking": "random"}, "confidence_threshold"),
        ({"confidence_threshold": 0.5, "remasking": "entropy"}, "confidence_threshold"),
        ({"latent_scale": -1.0}, "latent_scale"),
        ({"output_history": True}, "output_history"),
        ({"output_confidences": True}, "output_confidences needs return_dict_in_generate"),
    ],
)
def test_wrong_settings_are_errors_that_name_them(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, MASK]]), **settings)
    with pytest.raises(ValueError, match=message):
        VMDGenerationConfig(**settings)


@pytest.mark.parametrize("block_size", [None, 3])
def test_confidences_are_the_probabilities_at_the_step_of_revealing(block_size):
    """From the history and plain forward passes, for rows of unequal length."""
    model = small_model(block_size=block_size)
    ids, mask = padded([[1, MASK, MASK, 4, MASK, MASK, MASK], [MASK, 5, MASK, MASK]], "left")
    latents = normal(2, 3) if block_size is None else normal(2, 3, 3)
    settings = {"num_steps": 2, "return_dict_in_generate": True, "output_confidences": True}
    output = model.generate(ids, mask, latents=latents, output_history=True, **settings)
    expected, before = torch.ones(2, 7), ids
    for after in output.history:
        with torch.no_grad():
            probabilities = model(before, attention_mask=mask, latents=latents).logits.softmax(-1)
        revealed = before != after
        expected[revealed] = probabilities.gather(-1, after[..., None]).squeeze(-1)[revealed]
        before = after
    torch.testing.assert_close(output.confidences, expected)
    assert (output.confidences[ids == MASK] < 1).all()

    stopped = model.generate(ids, mask, stopping_criteria=StoppingCriteriaList([StopOnce(row=0, step=1)]), **settings)
    assert torch.equal(stopped.confidences == 0, stopped.sequences == MASK) and (stopped.confidences == 0).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.tensor([1, MASK])}, "input_ids"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.long)}, r"at least one row.*\(0, 2\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"one column unless max_new_tokens is given.*\(2, 0\)"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 2, 2)}, "attention_mask"),
        ({"latents": torch.zeros(1, 3)}, "latents"),
        ({"latents": torch.zeros(2, 4)}, "latents"),
        ({"latents": torch.zeros(2, 3), "resample_latents": True}, "latents.*resample_latents"),
        ({"generator": [torch.Generator()]}, "generator"),
        ({"generation_config": {"num_steps": 2}}, "generation_config"),
    ],
)
def test_wrong_inputs_are_errors_that_name_them(model, arguments, message):
    inputs = {"input_ids": torch.tensor([[1, MASK], [MASK, 2]])} | arguments
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs)


def test_latents_for_a_model_without_a_latent_are_an_error():
    with pytest.raises(ValueError, match=r"latents.*latent_size = 0"):
        small_model(latent_size=0).generate(torch.tensor([[1, MASK]]), latents=torch.zeros(1, 0))


def test_a_model_without_a_mask_token_cannot_generate():
    with pytest.raises(ValueError, match="mask_token_id"):
        small_model(mask_token_id=None).generate(torch.tensor([[1, MASK]]))


def test_a_table_of_positions_is_a_limit_that_is_named():
    model = small_model()  # 12 positions
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=10, num_steps=2).shape == (1, 12)
    with pytest.raises(ValueError, match="max_position_embeddings = 12"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=11, num_steps=2)
