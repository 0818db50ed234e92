import itertools

import pytest
import torch
from dense_reference import sees
from helpers import (
    MASK,
    digits,
    of_the_same_weights,
    pad_row,
    seeded,
    tiny_config,
    tiny_model,
)

from vmd_hf import blocks_vmd, nelbo
from vmd_hf.blocks_vmd import (
    EMPTY,
    PADDING,
    TokenIndex,
    block_attention_mask,
    join_token_indices,
    lay_out_blocks,
    may_attend,
)

# ---------------------------------------------------------------------------------------------------------------------
# Which token may attend to which
# ---------------------------------------------------------------------------------------------------------------------


def triples(places, row):
    return list(zip(*(getattr(places, name)[row].tolist() for name in ("block", "document", "clean")), strict=True))


def places_of(rows, num_columns):
    """`TokenIndex` of lists of (block, document, clean)."""
    values = torch.tensor(rows).view(len(rows), num_columns, 3).unbind(-1)
    return TokenIndex(block=values[0], document=values[1], clean=values[2].bool())


def allowed_by(query, key):
    return may_attend(query.map(lambda v: v[:, :, None]), key.map(lambda v: v[:, None, :]))


def test_two_blocks_of_two_attend_as_in_the_picture():
    """Rows are queries, columns keys, both [clean, noisy]; block diffusion (arXiv 2503.09573), figure 3."""
    picture = """
        # # . . . . . .
        # # . . . . . .
        # # # # . . . .
        # # # # . . . .
        . . . . # # . .
        . . . . # # . .
        # # . . . . # #
        # # . . . . # #
    """
    expected = [[cell == "#" for cell in line.split()] for line in picture.strip().splitlines()]
    layout = lay_out_blocks(torch.zeros(1, 4), None, None, 2)
    both = join_token_indices([layout.token_index(clean=True), layout.token_index(clean=False)])
    assert allowed_by(both, both)[0].tolist() == expected


def random_places(batch_size, length, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, n, (batch_size, length), generator=generator) for n in (4, 5, 2)]
    document = torch.tensor([0, 1, 2, PADDING, EMPTY])[draw[1]]
    return TokenIndex(block=draw[0], document=document, clean=draw[2].bool())


@pytest.mark.parametrize("seed", range(3))
def test_the_dense_masks_are_the_loop_over_queries_and_keys(seed):
    query, key = random_places(2, 7, seed), random_places(2, 9, seed + 100)
    expected = torch.tensor(
        [[[sees(q, k) for k in triples(key, row)] for q in triples(query, row)] for row in range(2)]
    )
    assert expected.any() and not expected.all()
    assert torch.equal(allowed_by(query, key), expected)

    config = tiny_config(block_size=2)
    config._attn_implementation = "sdpa"
    sdpa = block_attention_mask(config, query, key, torch.float32)
    assert sdpa.dtype == torch.bool
    assert torch.equal(sdpa, expected[:, None])  # one for all heads
    config._attn_implementation = "eager"
    for dtype in (torch.float32, torch.bfloat16):
        eager = block_attention_mask(config, query, key, dtype)
        assert eager.dtype == dtype
        assert eager.shape == (2, 1, 7, 9)
        assert torch.equal(eager == 0, expected[:, None])
        assert (eager[~expected[:, None]] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("documents", [1, 3])
def test_the_mask_of_flex_attention_knows_all_rows_of_a_batch(documents, monkeypatch):
    """Of three, which may share one index: then it is asked for rows that this one has not."""
    monkeypatch.setattr(blocks_vmd, "create_block_mask", lambda mask_mod, *args, **kwargs: mask_mod)
    config = tiny_config(block_size=2)
    config._attn_implementation = "flex_attention"
    query, key = random_places(documents, 7, 0), random_places(documents, 9, 100)
    mask_mod = block_attention_mask(config, query, key, torch.float32)
    rows, queries, keys = (torch.arange(size) for size in (3, 7, 9))
    found = mask_mod(rows[:, None, None], 0, queries[None, :, None], keys)
    assert torch.equal(found.expand(3, -1, -1), allowed_by(query, key).expand(3, -1, -1))


def test_places_that_all_rows_share_are_joined_with_those_of_each_row():
    shared, own = random_places(1, 3, 0), random_places(2, 4, 1)
    joined = join_token_indices([shared, own])
    for row in range(2):
        assert triples(joined, row) == triples(shared, 0) + triples(own, row)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_with_blocks_is_an_error(implementation, with_labels):
    model, input_ids = tiny_model(block_size=2), digits(1, 4)
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=f"attn_implementation must be 'eager'.*block_size.*{implementation}"):
        model(input_ids, labels=input_ids if with_labels else None)


# ---------------------------------------------------------------------------------------------------------------------
# Rows on the grid
# ---------------------------------------------------------------------------------------------------------------------

LETTERS = torch.arange(1, 100)  # distinct values to be laid out; 0 is what the grid has of its own


def grid_of(layout, values):
    return layout.scatter(values, 0).tolist()


def document_of(layout, batch_size=1):
    return layout.document.expand(batch_size, -1).tolist()


def test_whole_blocks_without_padding_are_their_own_grid():
    values = LETTERS[:12].view(2, 6)
    layout = lay_out_blocks(values, None, None, 3)
    assert (layout.num_blocks, layout.width) == (2, 3)
    assert layout.real is None and layout.columns is None
    assert torch.equal(layout.scatter(values, 0), values)
    assert torch.equal(layout.gather(values), values)
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert document_of(layout) == [[0] * 6]
    assert layout.token_index(clean=True).block.tolist() == [[0, 0, 0, 3, 3, 3]]
    assert layout.token_index(clean=True).clean.all() and not layout.token_index(clean=False).clean.any()
    assert layout.blocks(values).tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]


def test_the_last_block_is_filled_up():
    values = LETTERS[:10].view(2, 5)
    layout = lay_out_blocks(values, None, None, 3)
    assert (layout.num_blocks, layout.width) == (2, 3)
    assert grid_of(layout, values) == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]
    assert layout.real.tolist() == [[True] * 5 + [False]] * 2
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0]] * 2
    assert document_of(layout, 2) == [[0] * 5 + [PADDING]] * 2
    assert torch.equal(layout.gather(layout.scatter(values, 0)), values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_one_grid(side):
    rows = [LETTERS[:5], LETTERS[10:14], LETTERS[20:27]]
    values = torch.cat([pad_row(row, 7, side, 99) for row in rows])
    mask = torch.cat([pad_row(torch.ones_like(row), 7, side, 0) for row in rows])
    layout = lay_out_blocks(values, mask, None, 3)
    assert (layout.num_blocks, layout.width) == (3, 3)
    assert grid_of(layout, values) == [
        [1, 2, 3, 4, 5, 0, 0, 0, 0],
        [11, 12, 13, 14, 0, 0, 0, 0, 0],
        [21, 22, 23, 24, 25, 26, 27, 0, 0],
    ]
    for row, length in enumerate((5, 4, 7)):
        missing = 9 - length
        assert layout.real[row].tolist() == [True] * length + [False] * missing
        assert layout.position_ids[row].tolist() == list(range(length)) + [0] * missing
        assert layout.document[row].tolist() == [0] * length + [PADDING] * missing
    assert torch.equal(layout.gather(layout.scatter(values, 0))[mask.bool()], values[mask.bool()])


def test_padding_around_and_between_documents_is_left_out():
    values = LETTERS[:9][None]
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0]])
    for filler in (0, 1, 7):  # what stands at padding does not matter
        positions = torch.tensor([[0, 0, 1, 2, 0, 0, 0, 1, 0]]).masked_fill(mask == 0, filler)
        layout = lay_out_blocks(values, mask, positions, 2)
        assert grid_of(layout, values) == [[2, 3, 4, 0, 7, 8]]
        assert document_of(layout) == [[0, 0, 0, PADDING, 1, 1]]
        assert layout.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]


def grid_by_hand(values, positions, real, block_size):
    """Blocks of one row as lists of (value, position, document), `None` where they hold nothing."""
    blocks, document, before = [], 0, None
    for value, position, is_real in zip(values, positions, real, strict=True):
        if not is_real:
            continue
        if before is None or position <= before or position // block_size != before // block_size:
            blocks.append([None] * block_size)
        if before is not None and position <= before:
            document += 1
        blocks[-1][position % block_size] = (value, position, document)
        before = position
    return blocks


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_the_grid_is_the_loop_over_tokens(block_size):
    length, generator = 12, torch.Generator().manual_seed(block_size)
    values = LETTERS[: 6 * length].view(6, length)
    real = torch.rand(6, length, generator=generator) < 0.7
    positions = torch.zeros(6, length, dtype=torch.long)
    for row, column in itertools.product(range(6), range(1, length)):
        restart = torch.rand((), generator=generator) < 0.25
        positions[row, column] = 0 if restart else positions[row, column - 1] + 1
    layout = lay_out_blocks(values, real.long(), positions, block_size)
    by_hand = [
        grid_by_hand(*(part[row].tolist() for part in (values, positions, real)), block_size) for row in range(6)
    ]
    assert layout.num_blocks == max(map(len, by_hand))
    for row, blocks in enumerate(by_hand):
        cells = [cell for block in blocks for cell in block]
        cells += [None] * (layout.num_blocks * block_size - len(cells))
        assert grid_of(layout, values)[row] == [cell[0] if cell else 0 for cell in cells]
        assert layout.position_ids[row].tolist() == [cell[1] if cell else 0 for cell in cells]
        assert layout.document[row].tolist() == [cell[2] if cell else PADDING for cell in cells]
        assert layout.real[row].tolist() == [cell is not None for cell in cells]
    assert torch.equal(layout.gather(layout.scatter(values, 0))[real], values[real])
    vectors = torch.stack([values, -values], dim=-1).float()  # a further dimension is carried along
    grid = torch.stack([layout.scatter(part, 0.0) for part in vectors.unbind(-1)], dim=-1)
    assert torch.equal(layout.gather(grid)[real], vectors[real])


# ---------------------------------------------------------------------------------------------------------------------
# Steps that reveal too few tokens for a latent
# ---------------------------------------------------------------------------------------------------------------------

FEWEST = {"block_size": 4, "objective": "per_step", "objective_steps": [1, 2, 4]}


@pytest.mark.parametrize(
    "settings",
    [{}, {"prior": "learned"}, {"latent_input": "layers_and_positions"}, {"latent_input": "position_slices"}],
)
def test_steps_that_reveal_few_tokens_are_those_of_a_model_without_a_latent(settings):
    every = tiny_model(**FEWEST, **settings)
    large = of_the_same_weights(every, latent_min_tokens=3)
    plain = {"prior": "standard", "latent_input": "layers"}
    mdm = of_the_same_weights(every, latent_size=0, **plain)
    ids, masks = digits(6, 8), torch.full((6, 8), MASK)
    for steps in (1, 2, 4):  # of four tokens, two, and one
        losses = []
        for model in (every, large, mdm):
            model.config.objective_steps = [steps]
            losses.append(model(input_ids=ids, labels=ids, noise_seeds=torch.arange(6)))
        bounds = [
            nelbo(model, ids, None, num_steps=steps, bound="per_step", generator=seeded(0)) for model in (large, mdm)
        ]
        bounds.append(nelbo(every, ids, num_steps=steps, bound="per_step", generator=seeded(0)))
        texts = []
        for model in (large, every):
            generators = [seeded(row) for row in range(6)]
            texts.append(model.generate(masks, num_steps=steps, do_sample=True, generator=generators))
        if steps == 1:
            assert losses[1].loss == losses[0].loss and torch.equal(losses[1].kl_per_latent, losses[0].kl_per_latent)
            assert torch.equal(bounds[0].nelbo, bounds[2].nelbo) and (bounds[0].kl > 0.01).all()
            assert torch.equal(*texts)
        else:
            torch.testing.assert_close(losses[1].loss, losses[2].loss)
            assert losses[1].kl == 0 and (losses[1].kl_per_latent == 0).all()
            torch.testing.assert_close(bounds[0].nelbo, bounds[1].nelbo)
            assert (bounds[0].kl == 0).all() and (bounds[2].kl > 0.01).all()
            assert not torch.equal(*texts)


@pytest.mark.parametrize("settings, passes", [({"num_steps": 1}, 3), ({"num_steps": 2}, 4), ({"num_steps": 4}, 8)])
def test_a_learned_prior_is_read_only_where_a_step_reveals_enough_tokens(settings, passes):
    """Two blocks of 4; the second one's prior costs a pass, left out where all steps have the null latent."""
    model = tiny_model(**FEWEST, prior="learned", latent_min_tokens=3)
    output = model.generate(torch.full((1, 8), MASK), return_dict_in_generate=True, **settings)
    assert output.num_forward_passes.tolist() == [passes]


def test_with_a_confidence_threshold_all_that_is_masked_may_be_revealed():
    model = tiny_model(**FEWEST, latent_min_tokens=3)
    seen, for_steps = [], model.model.for_steps
    model.model.for_steps = lambda vectors, number: seen.append(number.tolist()) or for_steps(vectors, number)
    model.generate(torch.full((1, 4), MASK), confidence_threshold=0.999)  # one at a time
    assert seen == [[[4]], [[3]], [[2]], [[1]]]
