"""Generation of whole sequences and block by block against a loop over positions, caches, correctors, guidance."""

import math
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, zip_longest

import pytest
import torch
from helpers import MASK, PAD, StopOnce, normal, padded, randomise, seeded, tiny_config, unpadded
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from vmd_hf import VMDForMaskedDiffusion, sampling_vmd
from vmd_hf.blocks_vmd import EMPTY
from vmd_hf.generation_configuration_vmd import REMASKING_RULES
from vmd_hf.sampling_vmd import corrector_probability

SIZE, LATENT = 4, 4  # tokens of a block, dimensions of a latent
SURE_RULES = ("top_prob", "top_prob_margin", "entropy")
SIDES = ("left", "right")
CORRECTORS = ("cap", "rescale", "confidence")
DYNAMIC, STATIC, UNCACHED = {}, {"cache_implementation": "static"}, {"use_cache": False}
CACHES = (DYNAMIC, STATIC, UNCACHED)

M = MASK
ROWS = [
    [M, 1, M, M, 2, M, 3, M, M],  # gaps in three blocks, the last one of a single token
    [3, M, M],  # less than a block
    [0, 1, 2, 3, 4, 5, 6, 7, M, M, M, M, 8, M],  # given blocks first
    [M, 2, M, 4, 5, 6, 7, 8, 9, M, 1, M],  # a given block in between
    [1, 2, 3, 4, 5],  # nothing to fill
    [M] * 8,  # nothing given
]
MASKS = [[3, 2, 1], [2], [4, 1], [2, 2], [], [4, 4]]  # of the blocks in which there are any
PROMPTS = [[1, 2, 3, 4, 5, 6], [], [7], [8, 9, 0, 1], [2, 2, 3, 0, 5, 9, 4, 4, 1]]
NEW = 7
NEW_MASKS = [[2, 4, 1], [4, 3], [3, 4], [4, 3], [3, 4]]  # the same for seven new tokens after each prompt
RANDOM = {"do_sample": True, "remasking": "random", "num_steps": 2}


def block_model(seed=9, **overrides):
    """A model whose seed was chosen for predictions that vary. Rotary positions alone cannot tell the positions of
    masks apart, which would leave ties to rounding: there is also a table of the positions in a block."""
    settings = {"block_size": SIZE, "max_position_embeddings": 24, "position_embedding_type": "rotary"}
    settings["position_groups"] = [[i % SIZE for i in range(overrides.get("max_position_embeddings", 24))]]
    return randomise(VMDForMaskedDiffusion(tiny_config(**(settings | overrides))), seed=seed).eval()


@pytest.fixture(scope="module")
def model():
    return block_model()


@pytest.fixture(scope="module", params=["learned", "rotary", "whole"])
def each_model(request, model):
    """A model of each kind of positions, and one of whole sequences."""
    if request.param == "rotary":
        return model
    if request.param == "whole":
        return block_model(block_size=None)
    return block_model(seed=6, position_embedding_type="learned", position_groups=None)


@pytest.fixture(scope="module", params=[None, SIZE], ids=["whole", "blocks"])
def any_model(request):
    """A model of whole sequences and one with blocks."""
    return block_model(block_size=request.param)


def given_to(model, latents):
    """(rows, blocks, latent_size) as `generate` takes them."""
    return latents if model.config.block_size else latents[:, 0]


def masks_of(model, masks):
    """The number of masks of each block in which there are any; of whole sequences, of the sequence."""
    return masks if model.config.block_size else [[sum(row)] if row else [] for row in masks]


def last_columns(sequences, lengths):
    return [row[len(row) - length :].tolist() for row, length in zip(sequences, lengths, strict=True)]


def generators(rows):
    return [seeded(index) for index in rows]


class Record:
    def __init__(self):
        self.passes = []  # keyword arguments of the denoiser's forward, with "input_ids"
        self.logits = []

    @property
    def rows(self):
        return [len(call["input_ids"]) for call in self.passes]


@contextmanager
def recorded(model):
    """Every forward pass of the denoiser, and everything that `compute_logits` returns."""
    record, compute_logits = Record(), model.compute_logits

    def before(module, args, kwargs):
        record.passes.append(kwargs | {"input_ids": args[0]})

    def record_logits(hidden_states):
        logits = compute_logits(hidden_states)
        record.logits.append(logits.clone())
        return logits

    handle = model.model.register_forward_pre_hook(before, with_kwargs=True)
    model.compute_logits = record_logits
    try:
        yield record
    finally:
        handle.remove()
        del model.compute_logits


# --- the reference: one row, one block, one position at a time -------------------------------------------------------


def unlabelled_logits(model, row, block, z):
    """(tokens of the block, vocabulary): a forward pass over the row up to the end of the block, and nothing else."""
    size = model.config.block_size or len(row)
    latents = z
    if z is not None:
        latents = z[None]
        if model.config.block_size is not None:
            latents = normal(1, block + 1, len(z), seed=99)  # those of the clean blocks play no part
            latents[0, -1] = z
    prefix = torch.tensor([row[: (block + 1) * size]])
    return model(input_ids=prefix, latents=latents).logits[0, block * size :].double()


def logits_without_prompt(model, row, block, z, given):
    """The same where the given tokens of the block are masks and those of earlier blocks cannot be attended to."""
    size = model.config.block_size or len(row)
    start, end = block * size, min((block + 1) * size, len(row))
    tokens = [MASK if given[i] and i >= start else row[i] for i in range(end)]
    seen = [int(i >= start or not given[i]) for i in range(end)]
    latents = z
    if z is not None:
        latents = z[None]
        if model.config.block_size is not None:
            # A block in which nothing can be seen does not count as one.
            latents = normal(1, sum(any(seen[i : i + size]) for i in range(0, end, size)), len(z), seed=99)
            latents[0, -1] = z
    outputs = model(
        input_ids=torch.tensor([tokens]),
        attention_mask=torch.tensor([seen]),
        position_ids=torch.arange(end)[None],
        latents=latents,
    )
    return outputs.logits[0, start:].double()


def guided_logits(model, row, block, z, given, scale):
    conditional = unlabelled_logits(model, row, block, z)
    unconditional = logits_without_prompt(model, row, block, z, given)
    guided = unconditional + scale * (conditional - unconditional)
    return guided.masked_fill(conditional == -torch.inf, -torch.inf)


def sureness(probabilities, rule):
    best, second, *_ = sorted(probabilities, reverse=True)
    if rule == "entropy":
        return sum(p * math.log(p) for p in probabilities if p > 0)
    return best if rule == "top_prob" else best - second


@torch.no_grad()
def fill_by_hand(model, row, latents, rule="top_prob", num_steps=None, threshold=1.0, guidance=None):
    """One row greedily, in plain Python; `latents` (rounds, latent_size) or `None`.

    Returns the sequences after every step.
    """
    row, history, filled_blocks = list(row), [], 0
    given = [token != MASK for token in row]
    size = model.config.block_size or len(row)
    for start in range(0, len(row), size):
        masks = [i for i in range(start, min(start + size, len(row))) if row[i] == MASK]
        total, steps = len(masks), min(num_steps or len(masks), len(masks))
        z = None if latents is None or not masks else latents[filled_blocks]
        filled_blocks += bool(masks)
        step = 0
        while masks:
            step += 1
            if guidance is None:
                logits = unlabelled_logits(model, row, start // size, z)
            else:
                logits = guided_logits(model, row, start // size, z, given, guidance)
            probabilities = logits.softmax(-1).tolist()
            scores = {i: sureness(probabilities[i - start], rule) for i in masks}
            scheduled = step * total // steps - (total - len(masks))
            count = max(scheduled, 1, sum(score > threshold for score in scores.values()))
            for i in sorted(scores, key=scores.get, reverse=True)[:count]:
                row[i] = probabilities[i - start].index(max(probabilities[i - start]))
                masks.remove(i)
            history.append(list(row))
    return history


def filled(model, rows, latents, **settings):
    latents = [None] * len(rows) if latents is None else latents
    return [[row, *fill_by_hand(model, row, z, **settings)][-1] for row, z in zip(rows, latents, strict=True)]


@pytest.fixture(scope="module")
def reference(each_model):
    """`filled`, each result computed once for all tests."""
    done = {}

    def look_up(rows, latents, **settings):
        key = str((rows, latents.tolist(), settings))
        if key not in done:
            done[key] = filled(each_model, rows, latents, **settings)
        return done[key]

    return look_up


# --- equal to the reference ------------------------------------------------------------------------------------------


def assert_filled_as_by_the_loop(model, reference, rows, new, guidance=None, cache=DYNAMIC, **settings):
    """Rows with gaps, or prompts with `new` tokens to come, padded on the left and on the right in one batch."""
    latents = normal(len(rows), 3, LATENT, seed=2)
    open_rows = [row + [MASK] * (new or 0) for row in rows]
    expected = 2 * reference(open_rows, latents, guidance=guidance, **settings)
    assert guidance is None or expected != 2 * reference(open_rows, latents, guidance=None, **settings)
    (left, left_mask), (right, right_mask) = (padded(rows, side, width=None if new else 15) for side in SIDES)
    mask, settings["remasking"] = torch.cat([left_mask, right_mask]), settings.pop("rule")
    output = model.generate(
        torch.cat([left, right]),
        mask,
        latents=given_to(model, torch.cat([latents, latents])),
        max_new_tokens=new,
        guidance_scale=guidance,
        **settings,
        **cache,
    )
    assert output.shape == (len(mask), left.shape[1] + (new or 0))
    assert (last_columns(output, map(len, expected)) if new else unpadded(output, mask)) == expected


@pytest.mark.parametrize("rule", SURE_RULES)
@pytest.mark.parametrize("num_steps", [None, 1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_gaps_are_filled_as_by_a_loop_over_rows_blocks_and_positions(each_model, reference, rule, num_steps, cache):
    assert_filled_as_by_the_loop(each_model, reference, ROWS, None, rule=rule, num_steps=num_steps, cache=cache)


@pytest.mark.parametrize("rule", SURE_RULES)
@pytest.mark.parametrize("num_steps", [None, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_prompts_are_continued_as_by_such_a_loop(each_model, reference, rule, num_steps, cache):
    assert_filled_as_by_the_loop(each_model, reference, PROMPTS, NEW, rule=rule, num_steps=num_steps, cache=cache)


@pytest.mark.parametrize(
    "rows, new, scale", [(ROWS, None, 0.0), (ROWS, None, 0.5), (ROWS, None, 2.0), (PROMPTS, NEW, 3.0)]
)
@pytest.mark.parametrize("cache", CACHES)
def test_guided_rows_are_filled_as_by_two_forward_passes(each_model, reference, cache, rows, new, scale):
    settings = {"guidance": scale, "rule": "top_prob", "num_steps": 2 if new else 3}
    assert_filled_as_by_the_loop(each_model, reference, rows, new, cache=cache, **settings)


def test_the_rules_and_numbers_of_steps_differ(reference):
    # or the tests above could not tell one from another
    latents = normal(len(ROWS), 3, LATENT, seed=2)
    results = [reference(ROWS, latents, rule=rule, num_steps=steps) for rule in SURE_RULES for steps in (None, 2)]
    results.append(reference(ROWS, latents, rule="top_prob", num_steps=1))
    assert len({str(result) for result in results}) >= 4


@pytest.mark.parametrize("block_size, cache", [(None, DYNAMIC), *((SIZE, cache) for cache in CACHES)])
def test_a_model_without_a_latent_is_masked_or_block_diffusion(block_size, cache):
    model = block_model(latent_size=0, block_size=block_size)
    ids, mask = padded(ROWS, "left")
    for guidance in (None, 3.0):
        settings = {"num_steps": 2, "guidance_scale": guidance, "return_dict_in_generate": True}
        output = model.generate(ids, mask, **settings, **cache)
        assert output.latents is None and output.history is None
        assert unpadded(output.sequences, mask) == filled(model, ROWS, None, num_steps=2, guidance=guidance)
    sampled = model.generate(ids, mask, generator=seeded(0), resample_latents=True, **RANDOM, **cache)
    assert not (sampled == MASK).any()


@pytest.mark.parametrize("cache", CACHES)
def test_one_token_a_block_and_one_step_is_autoregressive_generation(cache):
    model = block_model(latent_size=0, block_size=1, objective="per_sample", objective_steps=(1,))
    prompt = [1, 2, 3]
    row = list(prompt)
    for _ in range(6):
        row.append(model(input_ids=torch.tensor([[*row, MASK]])).logits[0, -1].argmax().item())
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, num_steps=1, return_dict_in_generate=True, **cache
    )
    assert output.sequences.tolist() == [row]
    assert output.num_forward_passes.tolist() == [6]
    assert len(set(row[3:])) > 2


@pytest.mark.parametrize("block_size", [None, SIZE])
def test_a_model_in_half_precision_generates(block_size):
    model = block_model(block_size=block_size).to(torch.bfloat16)
    ids, mask = padded(ROWS)
    for cache in CACHES:
        output = model.generate(ids, mask, generator=seeded(0), guidance_scale=2.0, **RANDOM, **cache)
        assert all(MASK not in row for row in unpadded(output, mask))


# --- caches, batches, padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, RANDOM, {"guidance_scale": 2.5}, {"corrector": "rescale", "num_steps": 3}])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_a_cache_changes_neither_tokens_nor_logits(settings, dtype, tolerance):
    model = block_model().to(dtype)
    for rows, new in ((ROWS, None), (PROMPTS, NEW)):
        ids, mask = padded(rows, "left")
        outputs, records = [], []
        for cache in CACHES:
            with recorded(model) as record:
                outputs.append(model.generate(ids, mask, max_new_tokens=new, generator=seeded(3), **settings, **cache))
            records.append(record.logits)
        for output, record in zip(outputs[1:], records[1:], strict=True):
            assert torch.equal(output, outputs[0])
            for logits, expected in zip(record, records[0], strict=True):
                assert logits.dtype == dtype
                torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cache", CACHES)
def test_the_implementation_of_attention_changes_no_token(cache):
    model = block_model()
    ids, mask = padded(ROWS, "left")
    generate = partial(model.generate, ids, mask, latents=normal(len(ROWS), 3, LATENT), guidance_scale=2.0, **cache)
    expected = generate()
    model.set_attn_implementation("eager")
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize("cache", [DYNAMIC, STATIC])
@pytest.mark.parametrize("row", ROWS + [prompt + [MASK] * NEW for prompt in PROMPTS])
def test_with_a_cache_each_clean_token_is_read_once_and_as_it_stayed(model, cache, row):
    with recorded(model) as record:
        output = model.generate(torch.tensor([row]), generator=seeded(0), num_steps=2, **cache)[0].tolist()
    contexts = [call["context"] for call in record.passes if call["context"].input_ids is not None]
    blocks = [i // SIZE for i, token in enumerate(row) if token == MASK]
    before_last = SIZE * max(blocks, default=0)
    assert sum(context.input_ids.shape[1] for context in contexts) == before_last
    positions = [position for context in contexts for position in context.position_ids[0].tolist()]
    tokens = [token for context in contexts for token in context.input_ids[0].tolist()]
    assert positions == list(range(before_last)) and tokens == output[:before_last]


def test_without_a_cache_every_pass_reads_all_blocks_before_its_own(model):
    with recorded(model) as record:
        model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=NEW, num_steps=2, use_cache=False)
    read = [call["context"].input_ids.shape[1] for call in record.passes]
    assert read == [4, 4, 8, 8, 12]


@pytest.mark.parametrize("cache", [DYNAMIC, STATIC])
def test_a_cache_of_a_batch_has_room_for_the_longest_stretch_of_each_round_and_no_more(model, cache):
    # Round 1 starts at blocks 0, 0, 2, 0, -, 0; round 2 at 1, -, 3, 2, -, 1; round 3 at 2.
    ids, mask = padded(ROWS)
    with recorded(model) as record:
        model.generate(ids, mask, num_steps=1, **cache)
    contexts = [call["context"] for call in record.passes]
    assert [context.input_ids.shape for context in contexts] == [(6, 8), (6, 8), (6, 4)]
    new_tokens = [(context.new.document != EMPTY).sum(-1).tolist() for context in contexts]
    assert new_tokens == [[0, 0, 8, 0, 0, 0], [4, 0, 4, 8, 0, 4], [4, 0, 0, 0, 0, 0]]
    columns = [None if context.keys_values is None else context.keys_values[0][0].shape[2] for context in contexts]
    assert columns == ([None, 20, 20] if cache == STATIC else [None, 8, 16])


@pytest.mark.parametrize(
    "settings",
    [
        RANDOM,
        RANDOM | {"resample_latents": True},
        RANDOM | STATIC,
        RANDOM | UNCACHED,
        RANDOM | {"guidance_scale": 2.0},
        *(RANDOM | {"corrector": corrector, "corrector_strength": 0.9, "num_steps": 5} for corrector in CORRECTORS),
        {"do_sample": True, "temperature": 2.0, "top_k": 4, "confidence_threshold": 0.3},
    ],
)
def test_with_a_generator_for_each_row_the_batch_and_the_padding_do_not_matter(any_model, settings):
    alone = [
        any_model.generate(torch.tensor([row]), generator=[seeded(index)], **settings)[0].tolist()
        for index, row in enumerate(ROWS)
    ]
    for order in ([5, 2], [3, 4, 0, 1]):
        for side in ("left", "right"):
            ids, mask = padded([ROWS[index] for index in order], side, width=15)
            output = any_model.generate(ids, mask, generator=generators(order), **settings)
            assert unpadded(output, mask) == [alone[index] for index in order]


@pytest.mark.parametrize("settings", [{}, {"corrector": "cap", "corrector_strength": 0.5, "num_steps": 4}])
def test_the_same_seed_gives_the_same_samples(any_model, settings):
    ids, settings = torch.full((4, 11), MASK), RANDOM | settings
    first, second, other = (any_model.generate(ids, generator=seeded(seed), **settings) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("settings", [*({"remasking": rule} for rule in REMASKING_RULES), STATIC, UNCACHED])
def test_each_block_costs_its_steps_and_no_pass_more(any_model, num_steps, settings):
    settings = settings | {"num_steps": num_steps, "return_dict_in_generate": True}
    for rows, masks, new in ((ROWS, MASKS, None), (PROMPTS, NEW_MASKS, NEW)):
        ids, mask = padded(rows)
        with recorded(any_model) as record:
            output = any_model.generate(ids, mask, max_new_tokens=new, **settings)
        steps = [[min(num_steps or count, count) for count in row] for row in masks_of(any_model, masks)]
        assert output.num_forward_passes.tolist() == [sum(row) for row in steps]
        # In a round each row works on its next block. Rows that are done wait in the batch for the others.
        rounds = [max(row[number] for row in steps if len(row) > number) for number in range(max(map(len, steps)))]
        assert record.rows == [len(rows)] * sum(rounds)


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_without_masks_costs_no_pass(any_model, cache):
    ids, mask = padded([[1, 2, 3, 4, 5], [6]])
    with recorded(any_model) as record:
        output = any_model.generate(
            ids, mask, generator=seeded(0), return_dict_in_generate=True, output_history=True, **cache
        )
    assert unpadded(output.sequences, mask) == [[1, 2, 3, 4, 5], [6]]
    assert output.sequences.data_ptr() != ids.data_ptr()
    assert output.num_forward_passes.tolist() == [0, 0] and output.history == () and record.passes == []


@pytest.mark.parametrize("num_steps", [None, 1, 3])
def test_logits_are_computed_for_as_many_columns_as_a_row_may_have_masks_left(any_model, num_steps):
    ids, mask = padded(ROWS)
    with recorded(any_model) as record:
        any_model.generate(ids, mask, num_steps=num_steps, generator=seeded(0))
    expected = []
    for counts in zip_longest(*masks_of(any_model, MASKS), fillvalue=0):
        steps = [min(num_steps or count, count) for count in counts]
        for step in range(max(steps)):
            expected.append(max(n - step * n // t for n, t in zip(counts, steps, strict=True) if step < t))
    assert [logits.shape[:2] for logits in record.logits] == [(len(ROWS), columns) for columns in expected]


def test_with_a_threshold_logits_are_computed_for_as_many_columns_as_a_row_has_masks_left():
    model, ids = block_model(block_size=None), torch.tensor([[MASK] * 8, [1, 2, 3, 4, MASK, 6, 7, MASK]])
    with recorded(model) as record:
        output = model.generate(
            ids, confidence_threshold=0.4, generator=seeded(0), return_dict_in_generate=True, output_history=True
        )
    left = [int((state == MASK).sum(-1).max()) for state in (ids, *output.history)]
    assert [logits.shape[1] for logits in record.logits] == left[:-1] and len(left) < 9


@pytest.mark.parametrize("rule", ["top_prob", "top_prob_margin"])
@pytest.mark.parametrize("threshold, num_steps", [(0.3, None), (0.4, None), (0.5, 2)])
def test_a_confidence_threshold_reveals_all_of_the_block_that_exceed_it(any_model, rule, threshold, num_steps):
    ids, mask = padded(ROWS)
    latents = normal(len(ROWS), 3, LATENT, seed=4)
    settings = {"remasking": rule, "num_steps": num_steps}
    histories = [
        fill_by_hand(any_model, row, z, rule=rule, num_steps=num_steps, threshold=threshold)
        for row, z in zip(ROWS, latents, strict=True)
    ]
    settings |= {"latents": given_to(any_model, latents), "return_dict_in_generate": True}
    output = any_model.generate(ids, mask, confidence_threshold=threshold, **settings)
    assert output.num_forward_passes.tolist() == [len(history) for history in histories]
    assert unpadded(output.sequences, mask) == [
        [row, *history][-1] for row, history in zip(ROWS, histories, strict=True)
    ]
    assert any(len(history) < sum(masks) for history, masks in zip(histories, MASKS, strict=True))


# --- what is given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "guidance_scale": 3.0},
        {"confidence_threshold": 0.4},
        *({"corrector": corrector, "corrector_strength": 1.0, "num_steps": 6} for corrector in CORRECTORS),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_mask_is_filled_and_no_given_token_changes_after_any_step(any_model, settings, side):
    ids, mask = padded(ROWS, side, width=15)
    before = ids.clone()
    output = any_model.generate(
        ids, mask, generator=seeded(0), return_dict_in_generate=True, output_history=True, **settings
    )
    given, fillable = (ids != MASK) & (mask == 1), ids == MASK
    assert torch.equal(ids, before)
    for state in output.history:
        assert torch.equal(state[given], ids[given])
    assert torch.equal(output.sequences[given], ids[given])
    assert output.sequences.dtype == torch.int64 and output.sequences[fillable].max() < MASK


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_before_continued_prompts_stays_as_it_is_given(any_model, side):
    ids, mask = padded(PROMPTS, side)
    output = any_model.generate(ids, mask, max_new_tokens=NEW, generator=seeded(0), num_steps=1)
    for row, prompt in zip(output.tolist(), PROMPTS, strict=True):
        assert row[: 9 - len(prompt)] == [PAD] * (9 - len(prompt))
        assert row[9 - len(prompt) : 9] == prompt


def test_masks_in_a_prompt_are_filled_with_the_new_ones(any_model):
    latents = normal(1, 2, LATENT)
    output = any_model.generate(torch.tensor([[1, MASK, 2]]), max_new_tokens=3, latents=given_to(any_model, latents))
    assert output.tolist() == filled(any_model, [[1, MASK, 2, MASK, MASK, MASK]], latents)


# --- end of sequence, stopping, length -------------------------------------------------------------------------------

EOS = 9


class EndOfText(LogitsProcessor):
    """Only end-of-sequence tokens for a row with a marker and no more than so many masks; none for any other row."""

    def __init__(self, marker, masks):
        self.marker, self.masks = marker, masks

    def __call__(self, input_ids, scores):
        ends = (input_ids == self.marker).any(-1) & ((input_ids == MASK).sum(-1) <= self.masks)
        is_eos = torch.arange(scores.shape[-1]) == EOS
        return scores.masked_fill(torch.where(ends[:, None], ~is_eos, is_eos), -torch.inf)


class NoMarker(LogitsProcessor):
    def __init__(self, marker):
        self.marker = marker

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.marker] = -torch.inf
        return scores


def ending(masks, marker=7):
    return LogitsProcessorList([NoMarker(marker), EndOfText(marker, masks)])


MASKS_LEFT = (10, 9, 6, 4)  # the marked row writes ends of sequences when it has so many masks left


@pytest.mark.parametrize("cache", [DYNAMIC, UNCACHED])
@pytest.mark.parametrize("masks_left", [*MASKS_LEFT, 0])
def test_a_row_with_an_end_of_sequence_is_padded_after_it_and_takes_no_more_passes(any_model, cache, masks_left):
    # Blocks of the marked row: [7, 1, 2, .], four new tokens, four more, and one.
    prompts, model = [[7, 1, 2], [EOS, 3, 4, 5, 6], [1, 1]], any_model  # an end of sequence in a prompt ends nothing
    settings = {"max_new_tokens": 10, "logits_processor": ending(masks_left), "return_dict_in_generate": True}
    latents = normal(3, 4, LATENT, seed=4)
    alone = [
        model.generate(torch.tensor([prompt]), latents=given_to(model, z[None, :rounds]), **settings)
        for prompt, z, rounds in zip(prompts, latents, (4, 3, 3), strict=True)
    ]
    plain = alone[0].sequences[0].tolist()
    new = plain[3:]
    end = new.index(EOS) + 1 if EOS in new else 10
    expected = plain[:3] + new[:end] + [PAD] * (10 - end)
    latents = given_to(model, latents)
    ends_of_blocks = [stop for stop in (1, 5, 9, 10) if stop >= end] if model.config.block_size else [10]
    with recorded(model) as record:
        output = model.generate(
            *padded(prompts), latents=latents, eos_token_id=EOS, output_history=True, **settings, **cache
        )
    assert output.num_forward_passes.tolist() == [ends_of_blocks[0], 10, 10]
    assert torch.equal(output.history[-1], output.sequences)
    assert last_columns(output.sequences, [13, 15, 12]) == [
        expected,
        alone[1].sequences[0].tolist(),
        alone[2].sequences[0].tolist(),
    ]
    assert EOS not in output.sequences[1, 5:] and EOS not in output.sequences[2]
    with recorded(model) as record:
        single = model.generate(
            torch.tensor([prompts[0]]), latents=latents[:1], eos_token_id=[EOS], **settings, **cache
        )
    assert single.sequences.tolist() == [expected]
    assert len(record.passes) == ends_of_blocks[0]


def test_ends_of_sequences_in_the_test_above_stand_anywhere_in_a_block(model):
    # or it would say less than it seems to
    places = set()
    for masks_left in MASKS_LEFT:
        latents = normal(3, 4, LATENT, seed=4)[:1]
        output = model.generate(
            torch.tensor([[7, 1, 2]]), max_new_tokens=10, latents=latents, logits_processor=ending(masks_left)
        )
        places.add(output[0].tolist().index(EOS) % SIZE)
    assert len(places) >= 3


def test_infilling_knows_no_end_of_text(any_model):
    latents = given_to(any_model, normal(1, 2, LATENT))
    ids = torch.full((1, 8), MASK)
    plain = any_model.generate(ids, latents=latents)
    assert torch.equal(any_model.generate(ids, latents=latents, eos_token_id=plain[0, 1].item()), plain)


@pytest.mark.parametrize("cache", CACHES)
def test_a_stopped_row_is_left_as_it_is_and_the_others_go_on(any_model, cache):
    ids, mask = padded(ROWS)
    latents = given_to(any_model, normal(len(ROWS), 3, LATENT))
    settings = {"latents": latents, "return_dict_in_generate": True, "output_history": True}
    plain = any_model.generate(ids, mask, **settings, **cache)
    criterion = StopOnce(row=5, step=2)
    stopped = any_model.generate(ids, mask, stopping_criteria=StoppingCriteriaList([criterion]), **settings, **cache)
    assert torch.equal(stopped.sequences[5], plain.history[1][5])
    assert (stopped.sequences[5] == MASK).sum() == 6
    assert unpadded(stopped.sequences[:5], mask[:5]) == unpadded(plain.sequences[:5], mask[:5])
    assert stopped.num_forward_passes.tolist() == [6, 2, 5, 4, 0, 2]
    assert torch.equal(torch.stack(criterion.seen), torch.stack(stopped.history))  # masks included


@pytest.mark.parametrize("block_size", [None, SIZE])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_more_tokens_than_the_model_has_positions_are_an_error(block_size, positions):
    settings = {"position_embedding_type": positions, "position_groups": None, "max_position_embeddings": 10}
    model = block_model(block_size=block_size, **settings)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=8, num_steps=1).shape == (1, 10)
    # Padding does not count.
    ids, mask = padded([[1, 2], [1]], width=7)
    assert model.generate(ids, mask, max_new_tokens=8, num_steps=1).shape == (2, 15)
    with pytest.raises(ValueError, match="max_position_embeddings = 10"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=9, num_steps=1)
    with pytest.raises(ValueError, match="max_position_embeddings = 10"):
        model.generate(torch.full((1, 11), MASK), num_steps=1)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, LATENT), (2, 3, LATENT), (2, 1, LATENT), (1, 2, LATENT), (2, 2, LATENT + 1)])
def test_latents_of_a_wrong_shape_are_an_error_that_says_the_right_one(model, shape):
    ids = torch.tensor(
        [[1, 2, 3, 4, MASK, 6, 7, 8, MASK], [MASK, 2, 3, 4, 5, 6, 7, 8, 9]]
    )  # three blocks, two to fill
    with pytest.raises(ValueError, match=rf"latents must have shape .*\(2, 2, {LATENT}\)"):
        model.generate(ids, latents=torch.zeros(shape))


# --- latents ---------------------------------------------------------------------------------------------------------


def drawn_latents(seed, count):
    generator = seeded(seed)
    return [torch.randn(1, LATENT, generator=generator)[0] for _ in range(count)]


def assert_latents(model, passes, expected, scale=1.0):
    """In each pass the rows at work have these latents."""
    for call, latents in zip(passes, expected, strict=True):
        for row, z in latents.items():
            conditioning = model.model.condition(scale * z[None, None])
            torch.testing.assert_close(call["conditioning"][row : row + 1], conditioning)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_latent_is_drawn_for_each_block_that_is_filled_and_kept_over_its_steps(model, scale):
    ids, mask = padded([[MASK, 1, MASK, 3, 4, 5, 6, 7, MASK, 9], [1, 2, 3, 4, MASK, MASK, MASK, 8]])
    with recorded(model) as record:
        output = model.generate(
            ids, mask, generator=generators([4, 9]), latent_scale=scale, return_dict_in_generate=True
        )
    (a, b), (c,) = drawn_latents(4, 2), drawn_latents(9, 1)
    assert torch.equal(output.latents, scale * torch.stack([torch.stack([a, b]), torch.stack([c, 0 * c])]))
    assert len(record.passes) == 4
    assert_latents(model, record.passes, [{0: a, 1: c}, {0: a, 1: c}, {1: c}, {0: b}], scale)


@torch.no_grad()
def test_resampling_draws_a_latent_for_each_step_of_each_block(model):
    ids, mask = padded([[MASK, 1, MASK, 3, 4, 5, 6, 7, MASK, 9], [1, 2, 3, 4, MASK, MASK, MASK, 8]])
    with recorded(model) as record:
        output = model.generate(
            ids, mask, generator=generators([4, 9]), resample_latents=True, return_dict_in_generate=True
        )
    a, c = drawn_latents(4, 3), drawn_latents(9, 3)
    assert_latents(model, record.passes, [{0: a[0], 1: c[0]}, {0: a[1], 1: c[1]}, {1: c[2]}, {0: a[2]}])
    # Those of the last step of each block.
    assert torch.equal(output.latents, torch.stack([torch.stack([a[1], a[2]]), torch.stack([c[2], 0 * c[2]])]))


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}, {"remasking": "entropy", "num_steps": 2}])
def test_returned_latents_given_back_reproduce_the_sequences(any_model, settings):
    model = any_model
    for rows, new in ((ROWS, None), (PROMPTS, NEW)):
        ids, mask = padded(rows)
        settings = settings | {"max_new_tokens": new, "return_dict_in_generate": True}
        first = model.generate(ids, mask, generator=seeded(0), **settings)
        if new and model.config.block_size is None:
            torch.testing.assert_close(first.latents, torch.randn(len(rows), LATENT, generator=seeded(0)))
        assert first.latents.shape == given_to(model, torch.empty(len(rows), 3, LATENT)).shape
        halved = model.generate(ids, mask, generator=seeded(0), latent_scale=0.5, **settings)
        torch.testing.assert_close(halved.latents, first.latents / 2)
        second = model.generate(ids, mask, latents=first.latents, latent_scale=0.1, **settings)
        assert torch.equal(second.latents, first.latents)
        assert torch.equal(second.sequences, first.sequences)
        other = model.generate(ids, mask, latents=-first.latents, **settings)
        assert not torch.equal(other.sequences, first.sequences)


# --- streaming -------------------------------------------------------------------------------------------------------


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ends += 1


class DraftCollector(Collector):
    """One that keeps drafts, too, and how many columns had been put before each of them."""

    def __init__(self):
        super().__init__()
        self.drafts, self.columns_before = [], []

    def put_draft(self, value):
        self.columns_before.append(sum(put.shape[1] for put in self.puts))
        self.drafts.append(value.clone())


def final_columns(sequences):
    """Columns before the first mask of any row."""
    return min([column for row in sequences.tolist() for column, token in enumerate([*row, MASK]) if token == MASK])


@pytest.mark.parametrize("settings", [{}, RANDOM, {"num_steps": 1}, {"guidance_scale": 2.0} | UNCACHED])
@pytest.mark.parametrize("row", [PROMPTS[0] + [MASK] * NEW, PROMPTS[1] + [MASK] * NEW, *ROWS[:4]])
def test_a_prefix_is_streamed_as_soon_as_it_is_final(any_model, settings, row):
    ids, collector = torch.tensor([row]), DraftCollector()
    output = any_model.generate(ids, generator=seeded(1), streamer=collector, **settings)
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)
    assert torch.equal(collector.puts[0], ids[:, : final_columns(ids)])
    states = [ids, *collector.drafts]
    assert collector.columns_before == [final_columns(state) for state in states[:-1]]
    assert collector.ends == 1


def test_a_batch_is_streamed_together(any_model):
    ids = torch.tensor([[1, 2, MASK, 3, MASK, MASK, 1, MASK, MASK], [4, MASK, MASK, MASK, 5, 6, 7, 8, MASK]])
    collector = DraftCollector()
    output = any_model.generate(ids, generator=seeded(1), streamer=collector)
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)
    assert collector.puts[0].tolist() == [[1], [4]]  # the second column is open in the second row
    assert all(put.shape[1] for put in collector.puts)
    assert collector.columns_before == [final_columns(state) for state in [ids, *collector.drafts][:-1]]


@pytest.mark.parametrize("settings", [{}, {"corrector": "rescale", "corrector_strength": 1.0, "num_steps": 6}])
def test_there_is_a_draft_and_an_entry_of_the_history_after_every_pass(any_model, settings):
    ids = torch.tensor([ROWS[2], [*ROWS[3], 1, 2]])
    collector = DraftCollector()
    with recorded(any_model) as record:
        output = any_model.generate(
            ids,
            generator=seeded(1),
            streamer=collector,
            return_dict_in_generate=True,
            output_history=True,
            **settings,
        )
    assert len(record.passes) == len(output.history) == len(collector.drafts) > 4
    for draft, state in zip(collector.drafts, output.history, strict=True):
        assert draft.shape == ids.shape and torch.equal(draft, state)
    assert torch.equal(output.history[-1], output.sequences)


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_with_a_corrector_nothing_is_streamed_before_its_block_is_done(model, corrector):
    collector = Collector()
    output = model.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=NEW,
        corrector=corrector,
        corrector_strength=1.0,
        num_steps=6,
        generator=seeded(2),
        streamer=collector,
    )
    assert [put.shape[1] for put in collector.puts if put.shape[1]] == [6, 2, 4, 1]
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)


def test_what_is_streamed_after_the_end_of_a_text_is_the_padding_of_the_sequence(any_model):
    collector = Collector()
    output = any_model.generate(
        torch.tensor([[7, 1, 2]]),
        max_new_tokens=10,
        generator=seeded(0),
        logits_processor=ending(8),
        eos_token_id=EOS,
        streamer=collector,
    )
    assert output[0, -1] == PAD
    assert torch.equal(torch.cat(collector.puts, dim=-1), output)
    assert collector.ends == 1


# --- logits processors -----------------------------------------------------------------------------------------------


class RecordingProcessor(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_logits_processors_see_the_sequence_and_the_scores_of_each_masked_position(model, guidance):
    rows = [[1, 2, 3, 4, MASK, MASK, 5, 6, 7], [MASK, 3, MASK, 4, 5, MASK, 7, 8, 9]]
    latents, recorder = normal(2, 2, LATENT), RecordingProcessor()
    output = model.generate(
        torch.tensor(rows),
        latents=latents,
        guidance_scale=guidance,
        num_steps=1,
        logits_processor=LogitsProcessorList([recorder]),
        return_dict_in_generate=True,
        output_history=True,
    )
    (first_ids, first_scores), (second_ids, second_scores) = recorder.calls
    assert first_ids.tolist() == [rows[0], rows[0], rows[1], rows[1]]
    assert second_ids.tolist() == [output.history[0][1].tolist()]

    def scores(row, block, z, given):
        if guidance is None:
            return unlabelled_logits(model, row, block, z).float()
        return guided_logits(model, row, block, z, given, guidance).float()

    given = [[token != MASK for token in row] for row in rows]
    left = scores(rows[0], 1, latents[0, 0], given[0])
    right = scores(rows[1], 0, latents[1, 0], given[1])
    later = scores(second_ids[0].tolist(), 1, latents[1, 1], given[1])
    expected = torch.stack([left[0], left[1], right[0], right[2]])
    torch.testing.assert_close(first_scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second_scores, later[1:2], rtol=1e-4, atol=1e-4)


def test_logits_processors_see_padded_rows_as_they_are_given(model):
    recorder = RecordingProcessor()
    ids, mask = padded([[1, 2, MASK, 4, 5, 6], [MASK, 3]], "left")
    model.generate(ids, mask, generator=seeded(0), num_steps=1, logits_processor=LogitsProcessorList([recorder]))
    assert [call[0].tolist() for call in recorder.calls] == [ids.tolist()]


# --- correctors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("num_steps", [1, 3, 5, 9, None])
def test_with_a_corrector_each_block_takes_exactly_its_steps(any_model, corrector, num_steps):
    ids, mask = padded(ROWS)
    with recorded(any_model) as record:
        output = any_model.generate(
            ids,
            mask,
            corrector=corrector,
            corrector_strength=1.0,
            num_steps=num_steps,
            generator=seeded(0),
            return_dict_in_generate=True,
        )
    blocks = MASKS if any_model.config.block_size else [masks[:1] for masks in MASKS]
    if num_steps is None:  # one for each mask
        assert output.num_forward_passes.tolist() == [sum(masks) for masks in MASKS]
    else:
        assert output.num_forward_passes.tolist() == [num_steps * len(masks) for masks in blocks]
        assert len(record.passes) == num_steps * max(len(masks) for masks in blocks)
    assert all(MASK not in row for row in unpadded(output.sequences, mask))


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("num_steps", [2, 5])
def test_a_corrector_remasks_filled_tokens_only_and_never_leaves_more_than_the_schedule(
    any_model, corrector, num_steps
):
    rows = 16
    ids = torch.full((rows, 4), MASK)
    ids[:, 1] = 5
    output = any_model.generate(
        ids,
        corrector=corrector,
        corrector_strength=1.0,
        num_steps=num_steps,
        generator=seeded(0),
        return_dict_in_generate=True,
        output_history=True,
    )
    states = [ids, *output.history]
    assert len(output.history) == num_steps
    masked_again = 0
    for step, (earlier, later) in enumerate(pairwise(states), start=1):
        again = (earlier != MASK) & (later == MASK)
        kept = (earlier != MASK) & (later != MASK)
        masked_again += again.sum()
        assert not again[:, 1].any()
        assert torch.equal(earlier[kept], later[kept])  # a token changes only by way of a mask
        filled_now = (later != MASK).sum(-1) - 1
        assert (filled_now <= step * 3 // num_steps).all()
        # Fewer only where there was not a mask left to fill, but those that are masked again at this step.
        short = filled_now < step * 3 // num_steps
        assert torch.equal((later == MASK)[short], again[short])
    assert (masked_again > 0) == (num_steps == 5)  # in two steps there are 1 and 2 to fill: sigma is 0 at the last


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("num_steps", [1, 3, None])
def test_a_corrector_of_almost_no_strength_changes_nothing(any_model, corrector, num_steps):
    ids = torch.tensor([[MASK, 1, MASK, MASK, 2, MASK, MASK, MASK], [MASK] * 8])
    latents = normal(2, 2, LATENT)
    latents = given_to(any_model, latents)
    settings = {"latents": latents, "num_steps": num_steps, "return_dict_in_generate": True, "output_history": True}
    expected = any_model.generate(ids, **settings)
    output = any_model.generate(ids, corrector=corrector, corrector_strength=1e-9, generator=seeded(0), **settings)
    assert torch.equal(torch.stack(output.history), torch.stack(expected.history))


@torch.no_grad()
def test_a_corrector_is_told_what_was_revealed_and_with_which_probability(any_model, monkeypatch):
    calls = []

    def record(revealed, probability, before, after, num_maskable, config):
        sigma = corrector_probability(revealed, probability, before, after, num_maskable, config)
        calls.append([value.clone() for value in (revealed, probability, before, after, num_maskable, sigma)])
        return sigma

    monkeypatch.setattr(sampling_vmd, "corrector_probability", record)
    row, num_steps = [MASK, 1, MASK, MASK, MASK, MASK, MASK, MASK], 6
    rounds = [0, 4] if any_model.config.block_size else [0]
    latents = normal(1, len(rounds), LATENT, seed=3)
    output = any_model.generate(
        torch.tensor([row]),
        latents=latents if any_model.config.block_size else latents[0],
        corrector="confidence",
        corrector_strength=1.0,
        num_steps=num_steps,
        generator=seeded(3),
        return_dict_in_generate=True,
        output_history=True,
    )
    states = [row, *(state[0].tolist() for state in output.history)]
    width = SIZE if any_model.config.block_size else len(row)
    assert len(calls) == num_steps * len(rounds)
    masked_again = 0
    for number, (revealed, probability, before, after, num_maskable, _) in enumerate(calls):
        index, step = divmod(number, num_steps)
        start = rounds[index]
        columns = range(start, start + width)
        total = sum(row[i] == MASK for i in columns)
        assert (before.item(), after.item(), num_maskable.item()) == (
            step * total // num_steps,
            (step + 1) * total // num_steps,
            total,
        )
        state, following = states[number], states[number + 1]
        assert revealed[0].tolist() == [row[i] == MASK != state[i] for i in columns]
        for column in columns:
            if not revealed[0, column - start]:
                continue
            masked_again += following[column] == MASK
            # Up from the state in which it was a mask for the last time.
            last = max(k for k in range(number) if states[k][column] == MASK)
            logits = unlabelled_logits(any_model, states[last], start // width, latents[0, index])
            expected = logits[column - start].softmax(-1)[state[column]].item()
            assert probability[0, column - start].item() == pytest.approx(expected, abs=1e-5)
    assert masked_again > 0


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_guidance_of_one_is_none(any_model, cache):
    ids, mask = padded(ROWS, "left")
    records = []
    for scale in (None, 1.0):
        with recorded(any_model) as record:
            output = any_model.generate(ids, mask, generator=seeded(0), guidance_scale=scale, **cache)
        records.append((output, record.logits))
    (plain, plain_logits), (guided, logits) = records
    assert torch.equal(plain, guided)
    for first, second in zip(plain_logits, logits, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_guidance_is_one_pass_of_twice_as_many_rows_with_the_same_latents(any_model, cache):
    ids, mask = padded(ROWS)
    with recorded(any_model) as plain:
        any_model.generate(ids, mask, num_steps=2, generator=seeded(0), **cache)
    with recorded(any_model) as guided:
        output = any_model.generate(
            ids, mask, num_steps=2, generator=seeded(0), guidance_scale=2.0, return_dict_in_generate=True, **cache
        )
    assert guided.rows == [2 * rows for rows in plain.rows]
    assert [len(logits) for logits in guided.logits] == [len(logits) for logits in plain.logits]
    for call in guided.passes:
        first, second = call["conditioning"].chunk(2)
        assert torch.equal(first, second)
    assert output.num_forward_passes.max() == len(guided.rows)  # a pass counts once


def test_guidance_and_a_corrector_go_together(any_model):
    ids, mask = padded(ROWS)
    settings = {"corrector": "confidence", "corrector_strength": 1.0, "num_steps": 6, "guidance_scale": 2.0}
    generate = partial(any_model.generate, ids, mask, return_dict_in_generate=True, **settings)
    outputs = [generate(generator=seeded(0), **cache) for cache in CACHES]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].sequences, outputs[2].sequences)
    blocks = MASKS if any_model.config.block_size else [masks[:1] for masks in MASKS]
    assert outputs[0].num_forward_passes.tolist() == [6 * len(masks) for masks in blocks]


# --- a learned prior, and layers that are run through more than once -------------------------------------------------


@pytest.mark.parametrize("position_embedding_type", ["learned", "rotary"])
@pytest.mark.parametrize("changes", [{"prior": "learned"}, {"num_loops": 3}, {"prior": "learned", "num_loops": 2}])
def test_every_cache_and_every_batch_give_the_same_with_a_learned_prior_and_with_loops(
    position_embedding_type, changes
):
    model = block_model(position_embedding_type=position_embedding_type, **changes)
    rows = [[1, 2, 3, 4, 5], [6, 7, 8]]
    ids, mask = padded(rows, side="left")
    settings = {"max_new_tokens": 9, "num_steps": 2, "return_dict_in_generate": True}
    outputs = [
        model.generate(ids, mask, generator=generators([0, 1]), **settings, **cache)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    for other in outputs[1:]:
        assert torch.equal(other.sequences, outputs[0].sequences)
        torch.testing.assert_close(other.latents, outputs[0].latents, rtol=1e-5, atol=1e-5)
        assert torch.equal(other.num_forward_passes, outputs[0].num_forward_passes)
    for index, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), generator=generators([index]), **settings)
        assert alone.sequences[0].tolist() == outputs[0].sequences[index, -len(row) - 9 :].tolist()


def test_latents_of_a_learned_prior_are_its_mean_plus_scaled_noise():
    """With latent_scale = 0 the latents are the prior's means, which an unlabelled forward pass uses by default."""
    model = block_model(prior="learned")
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    ids = model.generate(prompt, max_new_tokens=SIZE * 2, num_steps=1, latent_scale=0.0)
    for start in range(0, ids.shape[1], SIZE):
        x_t = ids[:, : start + SIZE].clone()
        open_columns = slice(max(start, prompt.shape[1]), x_t.shape[1])
        if open_columns.start >= x_t.shape[1]:
            continue
        x_t[:, open_columns] = MASK
        with torch.no_grad():
            expected = model(input_ids=x_t).logits[:, open_columns].argmax(-1)
        assert torch.equal(ids[:, open_columns], expected)


def test_a_learned_prior_costs_one_pass_a_block_that_has_something_before_it():
    model = block_model(prior="learned")
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    output = model.generate(
        torch.full((1, 3 * SIZE), MASK), num_steps=2, return_dict_in_generate=True, generator=generators([0])
    )
    handle.remove()
    assert output.num_forward_passes.tolist() == [len(passes)] == [2 + 3 + 3]
