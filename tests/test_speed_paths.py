"""Paths that exist for speed alone give the numbers of the plain ones, and do not wait for the device."""

import pytest
import torch
from helpers import MASK, PAD, digits, of_the_same_weights, pad_row, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

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
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
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
    assert plan.keys == [[0, 4], [1, 5, 0], [2, 6, 0, 1], [3, 7, 0, 1, 2]]  # its own columns first
    # What grows with the square of the length is held once for all chunks, but for a shorter last one.
    assert len({mask.untyped_storage().data_ptr() for mask in plan.masks}) == 2
    plan = AttentionChunks.plan(*arguments, True, clean, clean, torch.float32)
    assert plan.keys == [[0], [1, 0], [2, 0, 1], [3, 0, 1, 2]]
    both = join_token_indices([clean, noisy])
    plan = AttentionChunks.plan(*arguments, False, both, both, torch.float32)
    assert plan.keys[:4] == [[0], [1, 0], [2, 0, 1], [3, 0, 1, 2]]
    assert plan.keys[4:] == [[0, 4], [1, 5, 0], [2, 6, 0, 1], [3, 7, 0, 1, 2]]
    for name, length in (("flex_attention", 500), ("eager", 500), ("sdpa", 124)):
        model.config._attn_implementation = name
        layout = model.model.lay_out(digits(1, length))
        index = layout.token_index(True)
        assert AttentionChunks.plan(model.config, layout, True, index, index, torch.float32) is None


@pytest.mark.parametrize("rows", ["whole", "padded left", "padded right"])
@pytest.mark.parametrize("settings", [{"guidance_scale": 2.0}, {"cache_implementation": "static"}])
def test_prompts_are_read_in_chunks(monkeypatch, rows, settings):
    rows = ROWS[rows]()
    model = tiny_model(block_size=3, max_position_embeddings=160, attn_implementation="sdpa")
    plans, of_prompts = [], AttentionChunks.of_prompts
    monkeypatch.setattr(AttentionChunks, "of_prompts", lambda *args: plans.append(of_prompts(*args)) or plans[-1])

    def generate():
        torch.manual_seed(0)
        return model.generate(**rows, max_new_tokens=6, num_steps=2, **settings)

    chunked = generate()
    assert len(plans[0].sizes) > 1
    monkeypatch.setattr(AttentionChunks, "plan", lambda *args: None)
    assert torch.equal(chunked, generate())


# --- generation ------------------------------------------------------------------------------------------------------

KINDS = {
    "MDM": {"latent_size": 0},
    "Gaussian": {},
    "chain": {"latent_type": "chain", "latent_size": 3},
}
LAYOUTS = {"whole": {}, "blocks": {"block_size": 4, "max_position_embeddings": 24}}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Waits(TorchDispatchMode):
    """Counts what would send a number, or the size of a result, from a device to the host."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.OPERATIONS
        if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


def waits(model, *args, **settings):
    with Waits() as found:
        model.generate(*args, **settings)
    return found.count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "resample_latents": True},
        {"do_sample": True, "generator": torch.Generator(), "remasking": "random"},
        {"remasking": "entropy", "corrector": "confidence", "corrector_strength": 0.5},
        {"guidance_scale": 1.5, "cache_implementation": "static", "remasking": "top_prob_margin"},
    ],
    ids=["argmax", "sampling", "generator", "corrector", "guidance"],
)
@every_layout
@every_kind
def test_no_step_waits_for_the_device(kind, layout, settings):
    model = tiny_model(**(KINDS[kind] | LAYOUTS[layout]))
    if kind != "Gaussian":
        settings = {name: value for name, value in settings.items() if name != "resample_latents"}
    input_ids = torch.full((3, 12), MASK)
    few, many = (waits(model, input_ids, num_steps=num_steps, **settings) for num_steps in (1, 4))
    assert many == few
    assert 0 < waits(model, input_ids, num_steps=1, generator=[torch.Generator() for _ in range(3)], do_sample=True)


def test_waits_are_counted():
    with Waits() as found:
        values = torch.arange(3)
        values.sum().item(), bool(values.any()), values.nonzero(), values[values > 1], values + 1, values[values]
    assert found.count == 4


@every_layout
@every_kind
def test_what_generate_returns_can_be_trained_on(kind, layout):
    model = tiny_model(**(KINDS[kind] | LAYOUTS[layout]))
    settings = {"output_history": True, "output_confidences": True, "return_dict_in_generate": True}
    output = model.generate(torch.full((2, 8), MASK), num_steps=2, **settings)
    tensors = [*output.history, *(value for value in output.values() if isinstance(value, torch.Tensor))]
    assert len(tensors) >= 5 and not any(tensor.is_inference() for tensor in tensors)
    for sequences in (output.sequences, model.generate(torch.full((2, 8), MASK), num_steps=2)):
        model.train()(input_ids=sequences, labels=sequences).loss.backward()


@every_layout
@every_kind
def test_generation_with_weights_in_bfloat16(kind, layout):
    """The weights of the plain model are those rounded ones, so that the two differ by the rounding of results."""
    model = tiny_model(**(KINDS[kind] | LAYOUTS[layout])).bfloat16()
    plain = of_the_same_weights(model)
    input_ids, new = digits(2, 5), 7
    settings = {"num_steps": 2, "output_confidences": True, "return_dict_in_generate": True, "do_sample": True}
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        outputs = [
            each.generate(
                input_ids, max_new_tokens=new, generator=torch.Generator().manual_seed(0), **settings, **cache
            )
            for each in (model, plain)
        ]
        assert (outputs[0].sequences == outputs[1].sequences).float().mean() > 0.8
        assert outputs[0].confidences.dtype == torch.float32
        same = outputs[0].sequences == outputs[1].sequences
        torch.testing.assert_close(outputs[0].confidences[same], outputs[1].confidences[same], rtol=0.2, atol=0.05)


def test_a_step_compiles_to_graphs_without_breaks_which_later_blocks_use_again():
    """Those of the first block and of the others, each with a step that reads and one that does not, at most once more
    for the lengths that a graph was made for."""
    model = tiny_model(**LAYOUTS["blocks"], latent_size=0, num_hidden_layers=1)
    input_ids, settings = torch.full((2, 24), MASK), {"num_steps": 2, "cache_implementation": "static"}
    wanted = model.generate(input_ids, **settings)
    forward, graphs, num_graphs = model.model.forward, [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(forward, backend=keep, fullgraph=True)

    def count(*args, **kwargs):
        outputs = compiled(*args, **kwargs)
        num_graphs.append(len(graphs))
        return outputs

    model.model.forward = count
    assert torch.equal(model.generate(input_ids, **settings), wanted)
    assert len(num_graphs) == 2 * 6 and num_graphs[5] == num_graphs[-1] > 0  # all are there after three blocks
