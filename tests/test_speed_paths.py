"""Paths that exist for speed alone give the numbers of the plain ones, and do not wait for the device."""

import pytest
import torch
from helpers import PAD, digits, pad_row, tiny_model

from vmd_hf.blocks_vmd import AttentionChunks, join_token_indices

# --- attention in chunks ---------------------------------------------------------------------------------------------


def whole_rows():
    return {"input_ids": digits(2, 150)}


def padded_rows(side):
    rows = [digits(1, length, seed=length)[0] for length in (97, 150, 20)]
    return {
        "input_ids": torch.cat([pad_row(row, 150, side, PAD) for row in rows]),
        "attention_mask": torch.cat([pad_row(torch.ones_like(row), 150, side, 0) for row in rows]),
    }


def packed_rows():
    """Documents that begin within a block, and one that is longer than a chunk."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((5, 91, 54), (100, 1, 49))]
    return {"input_ids": digits(2, 150), "position_ids": torch.stack(positions)}


ROWS = {
    "whole": whole_rows,
    "padded left": lambda: padded_rows("left"),
    "padded right": lambda: padded_rows("right"),
    "packed": packed_rows,
}


def loss_and_gradients(model, rows):
    labels = rows["input_ids"].masked_fill(rows.get("attention_mask", torch.ones(1)) == 0, -100)
    loss = model(**rows, labels=labels).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("settings", [{}, {"latent_size": 0, "objective": "per_step"}, {"prior": "learned"}])
@pytest.mark.parametrize("rows", ROWS)
def test_attention_in_chunks_is_attention(monkeypatch, rows, settings):
    rows = ROWS[rows]()
    model = tiny_model(block_size=3, max_position_embeddings=160, attn_implementation="sdpa", **settings)
    plans, plan = [], AttentionChunks.plan
    monkeypatch.setattr(AttentionChunks, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    with torch.no_grad():
        logits = model(**rows).logits
    chunked = loss_and_gradients(model, rows)
    assert len(plans) >= 3 and all(len(plan.sizes) > 1 for plan in plans)

    monkeypatch.setattr(AttentionChunks, "plan", lambda *args: None)
    whole = loss_and_gradients(model, rows)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-5, atol=0)
    for found, wanted in zip(chunked[1], whole[1], strict=True):
        assert (found - wanted).abs().max() <= 3e-5 * wanted.abs().max()
    real = rows.get("attention_mask", torch.ones_like(rows["input_ids"])) != 0
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(logits[real], model(**rows).logits[real], rtol=1e-4, atol=1e-5)


def test_a_chunk_reads_what_is_before_it_and_itself():
    model = tiny_model(block_size=4, max_position_embeddings=512, attn_implementation="sdpa")
    layout = model.model.lay_out(digits(1, 500))
    clean, noisy = layout.token_index(True), layout.token_index(False)
    arguments = model.config, layout
    plan = AttentionChunks.plan(*arguments, False, noisy, join_token_indices([clean, noisy]), torch.float32)
    assert plan.sizes == [128, 128, 128, 116]  # a quarter in whole blocks
    assert plan.keys == [[0, 4], [0, 1, 5], [0, 1, 2, 6], [0, 1, 2, 3, 7]]
    plan = AttentionChunks.plan(*arguments, True, clean, clean, torch.float32)
    assert plan.keys == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    both = join_token_indices([clean, noisy])
    plan = AttentionChunks.plan(*arguments, False, both, both, torch.float32)
    assert plan.keys[:4] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert plan.keys[4:] == [[0, 4], [0, 1, 5], [0, 1, 2, 6], [0, 1, 2, 3, 7]]
    for name, length in (("flex_attention", 500), ("eager", 500), ("sdpa", 124)):
        model.config._attn_implementation = name
        layout = model.model.lay_out(digits(1, length))
        index = layout.token_index(True)
        assert AttentionChunks.plan(model.config, layout, True, index, index, torch.float32) is None
