import itertools
import math

import pytest
import torch
from dense_reference import dense_two_streams, prior_of_block, sees
from helpers import (
    CLOSE,
    GRID,
    KINDS,
    MASK,
    OBJECTIVES,
    PAD,
    PER_POSITION,
    POSITIONS,
    SCALARS,
    digits,
    every_objective,
    implementations_beside_eager,
    latents_for,
    noise_for,
    normal,
    pad_row,
    padded_batch,
    some_masked,
    tiny_config,
    tiny_model,
    uniform,
)
from transformers import AutoModel

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, VMDModel

shapes = pytest.mark.parametrize("block_size", [None, 3])
OF_LATENTS = ("kl_per_latent", "posterior_shift")


# ---------------------------------------------------------------------------------------------------------------------
# Denoising: forward without labels
# ---------------------------------------------------------------------------------------------------------------------


def assert_logits_are_those_of_the_dense_reference(batch_size=2, **settings):
    model, x_t = tiny_model(**settings), some_masked(digits(batch_size, 8))
    z = latents_for(model, batch_size, 8)
    logits = model(x_t, latents=z).logits
    assert logits.shape == (batch_size, 8, 12)
    assert logits[..., [MASK, PAD]].eq(-math.inf).all()
    for row in range(batch_size):
        _, hidden_states = dense_two_streams(
            model, x_t[row], x_t[row], None if z is None else z[row].view(-1, z.shape[-1])
        )
        expected = hidden_states @ model.lm_head.weight.T
        torch.testing.assert_close(logits[row, :, :MASK], expected[:, :MASK], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [None, 1, 2, 3, 8, 20])
@pytest.mark.parametrize("position", ["both", "rotary", "learned", "groups"])
def test_the_logits_are_those_of_the_dense_reference(position, block_size, implementation):
    """With blocks, over the blocks as they stand."""
    settings = POSITIONS[position] | {"attn_implementation": implementation}
    assert_logits_are_those_of_the_dense_reference(block_size=block_size, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_size": 0},
        {"num_loops": 2},
        {"latent_input": "layers_and_positions"},
        {"latent_input": "position_slices", "latent_size": 48},
    ],
)
@shapes
def test_the_logits_are_those_of_the_dense_reference_for_all_kinds_of_latents(settings, block_size):
    assert_logits_are_those_of_the_dense_reference(1, block_size=block_size, **settings)


def test_a_pad_token_that_ends_texts_may_be_predicted():
    logits = tiny_model(pad_token_id=9, eos_token_id=9)(input_ids=digits(1, 4)).logits
    assert logits[..., 9].isfinite().all()
    assert logits[..., MASK].eq(-math.inf).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_heads_start_looking_at_one_grouping_each(implementation):
    config = tiny_config(**POSITIONS["group bias"], attn_implementation=implementation)
    attention = VMDForMaskedDiffusion(config).eval().model.layers[0].attention
    torch.nn.init.zeros_(attention.qkv_proj.weight[:64])  # queries and keys: what is left are the biases
    torch.nn.init.eye_(attention.qkv_proj.weight.data[64:])
    torch.nn.init.eye_(attention.o_proj.weight)
    x = normal(1, 16, 32)
    same = torch.stack([torch.tensor(group)[:, None] == torch.tensor(group) for group in GRID], -1)[None].float()
    output, *_ = attention(x, same_group=same)
    same_row, same_column = same[0].bool().unbind(-1)
    for head, seen in enumerate([same_row, same_column, torch.zeros(16, 16, dtype=torch.bool), same_row]):
        scores = torch.where(seen, math.exp(4), 1.0)  # four of a group, twelve others
        expected = (scores / scores.sum(-1, keepdim=True)) @ x[0, :, 8 * head : 8 * head + 8]
        torch.testing.assert_close(output[0, :, 8 * head : 8 * head + 8], expected, atol=1e-5, rtol=1e-5)


def test_group_bias_needs_an_attention_that_takes_biases():
    model = tiny_model(**POSITIONS["group bias"], attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="attn_implementation must be eager or sdpa with position_group_bias, got"):
        model(digits(1, 16))


@shapes
def test_the_default_latent_is_zero(block_size):
    model, x_t = tiny_model(block_size=block_size), some_masked(digits(2, 5))
    assert torch.equal(model(x_t).logits, model(x_t, latents=0 * latents_for(model, 2, 5)).logits)


def test_the_default_latent_is_the_mean_of_a_learned_prior():
    model, x_t = tiny_model(block_size=2, prior="learned"), some_masked(digits(1, 5))
    hidden_states, _ = dense_two_streams(model, x_t[0], x_t[0], torch.zeros(3, 4))
    z = torch.stack([prior_of_block(model, start, hidden_states)[0] for start in (0, 2, 4)])[None]
    assert (z[0, 1] - z[0, 2]).abs().max() > 0.1
    torch.testing.assert_close(model(x_t).logits, model(x_t, latents=z).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [None, 2])
def test_the_latent_of_a_row_or_block_changes_the_logits_of_that_one_only(block_size):
    """Clean tokens are read under the null latent: what follows a block depends on its tokens, not on its z."""
    model, x_t = tiny_model(block_size=block_size), some_masked(digits(2, 6))
    z = latents_for(model, 2, 6)
    logits, width = model(x_t, latents=z).logits[..., :MASK], block_size or 6
    for row, block in itertools.product(range(2), range(6 // width)):
        other = z.clone()
        other.view(2, -1, 4)[row, block] += 1
        changed = (model(x_t, latents=other).logits[..., :MASK] - logits).abs().amax(-1) > 1e-4
        expected = torch.zeros(2, 6, dtype=torch.bool)
        expected[row, width * block : width * (block + 1)] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("block_size", [None, 2])
def test_logits_depend_on_the_whole_row_and_with_blocks_on_those_up_to_their_own(block_size):
    model, x_t = tiny_model(block_size=block_size), some_masked(digits(1, 8))
    z, width = latents_for(model, 1, 8), block_size or 8
    logits = model(x_t, latents=z).logits[0, :, :MASK]
    for column in range(8):
        other = x_t.clone()
        other[0, column] = (x_t[0, column] + 3) % 10
        difference = (model(other, latents=z).logits[0, :, :MASK] - logits).abs().amax(-1)
        first = column // width * width
        assert difference[:first].eq(0).all()
        assert (difference[first:] > 1e-4).all()


@pytest.mark.parametrize("settings", [{}, PER_POSITION, {"block_size": 3}])
@pytest.mark.parametrize("position", ["both", "groups"])
def test_a_fresh_model_is_a_plain_masked_diffusion_model(position, settings):
    """The modulation starts as the identity: z has no effect, and the logits are those without the latent path."""
    config = tiny_config(initializer_range=0.3, **POSITIONS[position], **settings)
    with_latent = VMDForMaskedDiffusion(config).eval()
    blocks = {"block_size": config.block_size}
    plain = VMDForMaskedDiffusion(tiny_config(latent_size=0, **blocks, **POSITIONS[position])).eval()
    missing, unexpected = plain.load_state_dict(with_latent.state_dict(), strict=False)
    assert not missing
    latent_path = ("modulation", "conditioner", "latent_encoder", "position_inputs")
    assert all(any(part in name for part in latent_path) for name in unexpected)
    assert not any(part in name for part in latent_path for name in plain.state_dict())

    x_t = some_masked(digits(3, 6))
    expected = plain(x_t).logits
    assert expected[..., :MASK].std() > 0.1
    for z in (None, 10 * latents_for(with_latent, 3, 6)):
        torch.testing.assert_close(with_latent(x_t, latents=z).logits, expected)


def test_the_posterior_starts_with_means_of_unit_scale_and_little_noise():
    model = VMDForMaskedDiffusion(tiny_config(latent_size=64, hidden_size=128)).eval()
    means, log_variances = model.latent_encoder.out_proj(normal(500, 128)).chunk(2, dim=-1)
    assert means.std().item() == pytest.approx(1, rel=0.1)
    assert (log_variances == -3).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids must have shape \(batch, length\), got \(3,\)"),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}, r"input_ids.*got \(1, 2, 3\)"),
        ({"input_ids": None}, "input_ids.*None"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask.*\(2, 3\), got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask.*got \(2, 1, 3, 3\)"),
        ({"position_ids": torch.zeros(1, 3, dtype=torch.long)}, r"position_ids.*\(2, 3\), got \(1, 3\)"),
        ({"latents": torch.zeros(2, 5)}, r"latents.*\(2, 4\), got \(2, 5\)"),
        ({"latents": torch.zeros(1, 4)}, r"latents.*\(2, 4\), got \(1, 4\)"),
        ({"latents": torch.zeros(4)}, r"latents.*\(2, 4\), got \(4,\)"),
        ({"block_size": 2, "latents": torch.zeros(2, 4)}, r"latents must have shape.*\(2, 2, 4\), got \(2, 4\)"),
        ({"block_size": 2, "latents": torch.zeros(2, 3, 4)}, r"latents.*\(2, 2, 4\), got \(2, 3, 4\)"),
        ({"block_size": 2, "latents": torch.zeros(1, 2, 4)}, r"latents.*\(2, 2, 4\), got \(1, 2, 4\)"),
        ({"block_size": 2, "latents": torch.zeros(2, 2, 5)}, r"latents.*\(2, 2, 4\), got \(2, 2, 5\)"),
        ({"block_size": 2, "latents": torch.zeros(4, 4)}, r"latents.*\(2, 2, 4\), got \(4, 4\)"),
    ],
)
def test_wrong_shapes_are_errors(arguments, message):
    model = tiny_model(block_size=arguments.get("block_size"))
    arguments = {name: value for name, value in arguments.items() if name != "block_size"}
    for module in (model, model.model):
        with pytest.raises(ValueError, match=message):
            module(**({"input_ids": digits(2, 3)} | arguments))


def test_latents_for_a_model_without_a_latent_are_an_error():
    with pytest.raises(ValueError, match="latent_size = 0"):
        tiny_model(latent_size=0)(digits(2, 3), latents=torch.zeros(2, 4))


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("position", ["learned", "groups"])
def test_more_tokens_than_a_position_table_has_are_an_error(position, block_size):
    """Only tokens count, not what fills up the last block, nor padding."""
    model, ids = tiny_model(block_size=block_size, **POSITIONS[position]), digits(1, 16)
    assert model(ids).logits.shape == (1, 16, 12)
    wide, mask = pad_row(ids[0], 20, "left", PAD), pad_row(torch.ones_like(ids[0]), 20, "left", 0)
    torch.testing.assert_close(model(wide, attention_mask=mask).logits[:, 4:], model(ids).logits, **CLOSE)
    if block_size is not None:
        packed = torch.arange(16).repeat(2)[None]
        assert model(digits(1, 32), position_ids=packed).logits[..., :MASK].isfinite().all()
    for arguments in (
        {"input_ids": digits(1, 17)},
        {"input_ids": digits(1, 17), "labels": digits(1, 17)},
        {"input_ids": ids, "position_ids": torch.arange(1, 17)[None]},
    ):
        with pytest.raises(ValueError, match="at most max_position_embeddings = 16"):
            model(**arguments)


def test_rotary_positions_have_no_hard_limit_unless_a_latent_is_read_at_each_position_of_a_row():
    rotary = POSITIONS["rotary"]
    assert tiny_model(**rotary)(digits(1, 40)).logits[..., :MASK].isfinite().all()
    for settings in ({"latent_input": "layers_and_positions"}, PER_POSITION):
        with pytest.raises(ValueError, match=r"max_position_embeddings = 16.*got 17"):
            tiny_model(**settings, **rotary)(digits(1, 17))
        assert tiny_model(block_size=4, **settings, **rotary)(digits(1, 17)).logits.shape == (1, 17, 12)


# ---------------------------------------------------------------------------------------------------------------------
# Padding, batches and attention implementations
# ---------------------------------------------------------------------------------------------------------------------


def assert_a_padded_batch_is_its_rows(**settings):
    """Logits and loss of rows with padding on either side are those of each row alone."""
    model = tiny_model(**settings)
    rows = [digits(1, length, seed=length)[0] for length in (3, 5, 7, 4)]
    sides = ("left", "right", "left", "right")
    batch = {
        "input_ids": torch.cat([pad_row(row, 7, side, PAD) for row, side in zip(rows, sides, strict=True)]),
        "attention_mask": torch.cat(
            [pad_row(torch.ones_like(row), 7, side, 0) for row, side in zip(rows, sides, strict=True)]
        ),
    }
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    together = model(**batch, labels=labels)
    alone = [model(input_ids=row[None], labels=row[None]) for row in rows]
    for index, output in enumerate(alone):  # with blocks, 0 for those beyond the row
        for name in (name for name in OF_LATENTS if name in output):
            size = 1 if name == "kl_per_latent" else model.config.latent_size
            of_row, own = together[name][index].view(-1, size), output[name].view(-1, size)
            torch.testing.assert_close(of_row[: len(own)], own, rtol=1e-4, atol=1e-5)
            assert of_row[len(own) :].eq(0).all()
    # Summed over everything and divided by the number of labelled tokens: 3 + 5 + 7 + 4.
    for name in SCALARS:
        expected = sum(len(row) * output[name] for row, output in zip(rows, alone, strict=True)) / 19
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5)

    z = latents_for(model, 4, 7)
    logits = model(**batch, latents=z).logits
    for index, row in enumerate(rows):
        own = None if z is None else z[index : index + 1]
        if z is not None and model.config.block_size is not None:
            own = own[:, : -(-len(row) // model.config.block_size)]
        expected = model(row[None], latents=own).logits[0]
        actual = logits[index][batch["attention_mask"][index].bool()]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_objective
def test_a_padded_batch_is_its_rows(kind, objective):
    assert_a_padded_batch_is_its_rows(objective=objective, **KINDS[kind])


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_input": "layers_and_positions"},
        PER_POSITION,
        *POSITIONS.values(),
        {"position_embedding_type": "rotary", "position_groups": GRID},
        *({"block_size": 2} | POSITIONS[position] for position in ("both", "rotary", "learned", "groups")),
    ],
)
def test_a_padded_batch_is_its_rows_for_all_positions_and_inputs(settings):
    assert_a_padded_batch_is_its_rows(**settings)


def test_given_positions_replace_the_counted_ones():
    model, x_t = tiny_model(**POSITIONS["learned"]), some_masked(digits(1, 4))
    counted = model(x_t).logits
    assert torch.equal(model(x_t, position_ids=torch.arange(4)[None]).logits, counted)
    assert (model(x_t, position_ids=torch.arange(4, 8)[None]).logits - counted)[..., :MASK].abs().max() > 0.1


@shapes
@implementations_beside_eager
def test_attention_implementations_agree(implementation, block_size):
    device = "cuda" if implementation == "flex_attention" and torch.cuda.is_available() else "cpu"
    model = tiny_model(block_size=block_size).to(device)
    input_ids, mask = (tensor.to(device) for tensor in padded_batch())
    z = latents_for(model, 2, 7).to(device)
    labels = input_ids.masked_fill(mask == 0, -100)
    results = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        with torch.no_grad():
            plain = model(some_masked(digits(2, 7)).to(device), latents=z).logits
            padded = model(input_ids, attention_mask=mask, latents=z).logits[mask.bool()]
            loss = model(input_ids, attention_mask=mask, labels=labels).loss
        results.append((plain, padded, loss))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


PACKED = {
    "side by side": "AAAAABBBBBB",
    "padding between": "AAAAA..BBBBBB",
    "padding around": "..AAAAABBBBBB.",
    "padding everywhere": ".AA.AAA..BBB.BBB.",
    "a full block first": "AAAABBB",
    "three documents": "AAABCCCCC",
}


def packed_row(pattern, x_of, starts=None):
    """input_ids, attention_mask and position_ids (1, length) of documents by their letters, and those of each alone.

    `starts`: the first position of each document by its letter, 0 where it has none.
    """
    starts, counts, columns, mask, positions = starts or {}, {}, [], [], []
    for letter in pattern:
        count = counts.get(letter, 0)
        columns.append(PAD if letter == "." else x_of(letter)[count].item())
        positions.append(0 if letter == "." else starts.get(letter, 0) + count)
        mask.append(int(letter != "."))
        counts[letter] = count + 1
    counts.pop(".", None)
    packed = [torch.tensor([value]) for value in (columns, mask, positions)]
    alone = {
        letter: (x_of(letter)[:count][None], torch.arange(count)[None] + starts.get(letter, 0))
        for letter, count in counts.items()
    }
    return packed, alone


def text_of(letter):
    return digits(1, 10, seed=ord(letter))[0]


def columns_of(pattern, letter):
    return [index for index, other in enumerate(pattern) if other == letter]


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        *((case, {"block_size": 4} | POSITIONS[position]) for case in PACKED for position in ("rotary", "learned")),
        ("padding everywhere", {"block_size": 4} | POSITIONS["both"]),
        ("padding everywhere", {"block_size": 4} | POSITIONS["groups"]),
        *(
            (case, {"latent_size": 0} | POSITIONS[position])
            for case in ("side by side", "padding everywhere")
            for position in ("both", "learned", "group bias")
        ),
    ],
)
@implementations_beside_eager
def test_documents_of_a_packed_row_have_the_logits_of_rows_of_their_own(case, settings, implementation):
    """They restart where positions do, and see nothing of one another."""
    if "position_group_bias" in settings and implementation == "flex_attention":
        pytest.skip("flex attention takes no biases")
    device = "cuda" if implementation == "flex_attention" else "cpu"
    pattern, model = PACKED[case], tiny_model(**settings).to(device)
    (x_t, mask, position_ids), alone = packed_row(pattern, lambda letter: some_masked(text_of(letter)[None])[0])
    z = {letter: latents_for(model, 1, ids.shape[1], ord(letter)) for letter, (ids, _) in alone.items()}
    with_latents = {} if model.config.latent_size == 0 else {"latents": torch.cat(list(z.values()), dim=1).to(device)}
    inputs = {"position_ids": position_ids.to(device)} | with_latents
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        packed = model(x_t.to(device), attention_mask=mask.to(device), **inputs).logits[0]
        for letter, (ids, _) in alone.items():
            own = {"latents": z[letter].to(device)} if with_latents else {}
            expected = model(ids.to(device), **own).logits[0]
            torch.testing.assert_close(packed[columns_of(pattern, letter)], expected, rtol=1e-4, atol=1e-4)
        if "." not in pattern:
            torch.testing.assert_close(model(x_t.to(device), **inputs).logits[0], packed)


@pytest.mark.parametrize(
    ("settings", "objective"),
    [*(({"block_size": 4}, objective) for objective in OBJECTIVES), ({"latent_size": 0}, "vmd")],
)
@pytest.mark.parametrize("case", list(PACKED))
def test_documents_of_a_packed_row_have_the_loss_of_rows_of_their_own(case, settings, objective):
    pattern, model = PACKED[case], tiny_model(objective=objective, **settings)
    (input_ids, mask, position_ids), alone = packed_row(pattern, text_of)
    labels = input_ids.masked_fill(mask == 0, -100)
    num_blocks = {letter: -(-ids.shape[1] // 4) for letter, (ids, _) in alone.items()}
    noise = noise_for(model, 1, 4 * sum(num_blocks.values())) | {"position_noise": uniform(1, len(pattern))}
    of_blocks = [name for name in noise if name != "position_noise" and "block_size" in settings]
    for given in (noise, {}) if of_blocks else (noise,):  # of blocks evaluation's own noise, too
        packed = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, labels=labels, **given)
        sums, kl_per_latent, block = dict.fromkeys(SCALARS, 0.0), [], 0
        for letter, (ids, _) in alone.items():
            own = slice(block, block + num_blocks[letter])
            block = own.stop
            given_alone = given | {name: given[name][:, own] for name in of_blocks if given}
            if given:
                given_alone["position_noise"] = noise["position_noise"][:, columns_of(pattern, letter)]
            output = model(input_ids=ids, labels=ids, **given_alone)
            sums = {name: sums[name] + output[name] * ids.shape[1] for name in SCALARS}
            kl_per_latent.append(output.get("kl_per_latent"))
        for name in SCALARS:
            torch.testing.assert_close(packed[name] * int(mask.sum()), sums[name], **CLOSE)
        if of_blocks:
            torch.testing.assert_close(packed.kl_per_latent, torch.cat(kl_per_latent, dim=1), **CLOSE)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_packed_document_that_starts_later_has_the_posterior_of_a_row_of_its_own(start):
    """Its first block has nothing before it, although the last block of the other document is not full."""
    model, pattern = tiny_model(block_size=4), "AAAAABBBB"
    (input_ids, _, position_ids), alone = packed_row(pattern, text_of, starts={"B": start})
    (ids, own_positions), num_blocks = alone["B"], 1 + (start + 3) // 4
    noise = noise_for(model, 1, 4 * (2 + num_blocks))
    noise |= {"times": torch.ones(1, 2 + num_blocks), "position_noise": uniform(1, 9)}  # everything is masked
    packed = model(input_ids=input_ids, position_ids=position_ids, labels=input_ids, **noise)
    noise = {name: value[:, 5:] if name == "position_noise" else value[:, 2:] for name, value in noise.items()}
    expected = model(input_ids=ids, position_ids=own_positions, labels=ids, **noise)
    assert expected.posterior_shift.ne(0).any(-1).all()
    torch.testing.assert_close(packed.posterior_shift[:, 2:], expected.posterior_shift, **CLOSE)


def test_documents_of_a_packed_row_cannot_share_a_latent():
    model, x_t = tiny_model(), digits(1, 5)
    model(x_t, position_ids=torch.tensor([[3, 4, 6, 7, 9]]))  # one document
    for labels in (None, x_t):
        with pytest.raises(ValueError, match="position_ids must not restart within a row"):
            model(x_t, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), labels=labels)


# ---------------------------------------------------------------------------------------------------------------------
# What transformers expects of a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("padding", ["none", "last block", "left", "right", "packed"])
@shapes
def test_hidden_states_come_back_in_the_columns_of_the_row(block_size, padding, with_labels):
    if block_size is None and padding == "packed":
        pytest.skip("whole sequences with a latent are not packed")
    model, row = tiny_model(block_size=block_size), digits(1, 5 if padding == "last block" else 6)
    arguments = {"input_ids": row}
    if padding in ("left", "right"):
        arguments = {
            "input_ids": pad_row(row[0], 8, padding, PAD),
            "attention_mask": pad_row(torch.ones_like(row[0]), 8, padding, 0),
        }
    if padding == "packed":
        arguments["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1]])
    latents = latents_for(model, 1, 6 if padding in ("none", "last block") else 8)
    real = arguments.get("attention_mask", torch.ones_like(row)).bool()
    if with_labels:
        arguments["labels"] = arguments["input_ids"].masked_fill(~real, -100)
        arguments |= {"position_noise": torch.ones(real.shape), "times": torch.full(latents.shape[:-1], 0.5)}
    assert model(**arguments).hidden_states is None
    hidden_states = model(**arguments, output_hidden_states=True).hidden_states
    # The embeddings and the two layers of the denoiser; the latent encoder's are not among them.
    assert [state.shape for state in hidden_states] == [(*real.shape, 32)] * 3
    positions = arguments.get("position_ids", torch.arange(row.shape[1])[None])
    embeddings = model.model.embeddings(row, positions)  # of the clean tokens: of them nothing was masked
    torch.testing.assert_close(hidden_states[0][real], embeddings[0])
    if not with_labels:
        logits = model.lm_head(hidden_states[-1])[real]
        torch.testing.assert_close(logits[:, :MASK], model(**arguments).logits[real][:, :MASK])
        assert torch.equal(model.model(**arguments).last_hidden_state[real], hidden_states[-1][real])
        # They are those of the tokens that are denoised, which the latent modulates.
        others = model(**arguments, latents=latents, output_hidden_states=True).hidden_states
        for state, other in zip(hidden_states[1:], others[1:], strict=True):
            assert ((state - other)[real].abs().amax(-1) > 1e-3).all()


@shapes
def test_hidden_states_may_be_selected_by_their_index(block_size):
    """As transformers has it: the others are None."""
    model, x_t = tiny_model(block_size=block_size), some_masked(digits(2, 5))
    every = model(x_t, output_hidden_states=True).hidden_states
    selected = model(x_t, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in selected] == [False, True, False]
    assert torch.equal(selected[0], every[0]) and torch.equal(selected[-1], every[-1])


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("block_size", [None, 2])
def test_attention_weights_are_zero_where_a_token_may_not_look(block_size, with_labels):
    model, input_ids = tiny_model(block_size=block_size, attn_implementation="eager"), digits(1, 4)
    inputs = {"labels": input_ids.clone()} if with_labels else {}
    clean, noisy = [(0, 0, True)] * 2 + [(1, 0, True)] * 2, [(0, 0, False)] * 2 + [(1, 0, False)] * 2
    queries, keys = noisy if with_labels else clean + noisy, clean + noisy
    if block_size is None:
        clean, queries, keys = [], [(0, 0, False)] * 4, [(0, 1, False)] + [(0, 0, False)] * 3
        inputs["attention_mask"] = torch.tensor([[0, 1, 1, 1]])
        if with_labels:
            inputs["labels"][0, 0] = -100
    expected = torch.tensor([[sees(query, key) for key in keys] for query in queries])
    attentions = model(input_ids, output_attentions=True, **inputs).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (1, 4, len(queries), len(keys))
        assert torch.equal(weights[0] > 0, expected.expand(4, -1, -1))
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, len(queries)))


@shapes
def test_a_tuple_on_request(block_size):
    model, input_ids = tiny_model(block_size=block_size), digits(2, 5)
    assert torch.equal(model(input_ids, return_dict=False)[0], model(input_ids).logits)
    assert torch.equal(
        model(input_ids, labels=input_ids, return_dict=False)[0], model(input_ids, labels=input_ids).loss
    )


@pytest.mark.parametrize("tied", [True, False])
def test_word_embeddings_are_tied_as_the_config_says(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for current in (model, VMDForMaskedDiffusion.from_pretrained(tmp_path)):
        assert (current.lm_head.weight is current.get_input_embeddings().weight) == tied
        assert current.get_output_embeddings() is current.lm_head
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied


def test_a_vocabulary_keeps_its_special_tokens():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"mask_token_id, pad_token_id and eos_token_id \(10, 11, None\).*got 11"):
        model.resize_token_embeddings(11)
    assert model.lm_head.weight.shape[0] == 12
    model.resize_token_embeddings(12)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tied, tmp_path):
    model, input_ids = tiny_model(tie_word_embeddings=tied), digits(2, 5)
    before = model(input_ids).logits
    model.resize_token_embeddings(20)
    assert model.config.vocab_size == model.model.config.vocab_size == 20
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path)
    for current in (model, VMDForMaskedDiffusion.from_pretrained(tmp_path)):
        logits = current(input_ids).logits
        assert logits.shape == (2, 5, 20)
        torch.testing.assert_close(logits[..., :12], before)
        assert logits[..., 12:].isfinite().all()
        assert logits[..., [MASK, PAD]].eq(-math.inf).all()
        new_tokens = torch.tensor([[12, 19, 3]])
        assert current(new_tokens, labels=new_tokens).loss.isfinite()


@shapes
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, implementation, block_size):
    config = tiny_config(block_size=block_size, attn_implementation=implementation)
    model, input_ids = VMDForMaskedDiffusion(config).eval(), digits(4, 6)
    expected = model(input_ids, labels=input_ids)
    model = model.to(dtype)
    logits = model(input_ids, latents=latents_for(model, 4, 6)).logits
    assert logits.dtype == dtype
    assert logits[..., :MASK].isfinite().all()
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    assert model.latent_encoder.kl_warmup_progress.dtype == torch.long
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    for name in ("loss", "reconstruction_loss", "kl", "kl_per_latent"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], expected[name], rtol=0.05, atol=0.02)


@shapes
def test_autocast(block_size):
    model, input_ids = VMDForMaskedDiffusion(tiny_config(block_size=block_size)).eval(), digits(4, 6)
    expected = model(input_ids, labels=input_ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(input_ids).logits.dtype == torch.bfloat16
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "dropout, silenced",
    [
        ("attention_dropout", "mlp.down_proj"),
        ("hidden_dropout", "mlp.down_proj"),  # drops what the attention adds
        ("hidden_dropout", "attention.o_proj"),  # drops what the feed-forward layer adds
    ],
)
def test_dropout_acts_in_training_only(dropout, silenced, implementation):
    model, input_ids = tiny_model(**{dropout: 0.5}), digits(2, 6)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule(silenced).weight.zero_()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_the_whole_model_loads_from_the_denoiser_alone(tmp_path):
    model, x_t = tiny_model(), some_masked(digits(2, 6))
    model.model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is VMDModel
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded(x_t).logits, model(x_t).logits)
    assert loaded.latent_encoder.kl_warmup_progress == 0  # missing in the file: must not be left as it was in memory
    assert loaded(digits(2, 6), labels=digits(2, 6)).loss.isfinite()


def test_loading_in_low_precision_keeps_counters_whole(tmp_path):
    model = tiny_model(kl_warmup_steps=1000, **POSITIONS["groups"])
    model.latent_encoder.kl_warmup_progress.fill_(301)  # not a bfloat16 number
    model.save_pretrained(tmp_path)
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.latent_encoder.kl_warmup_progress.item() == 301
    assert loaded.model.embeddings.position_groups.tolist() == GRID


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"], ["modulation"]])
def test_low_rank_adapters_can_be_put_on_every_linear_layer(targets):
    peft = pytest.importorskip("peft")
    model, input_ids = tiny_model(), digits(2, 5)
    expected = model(input_ids, labels=input_ids).loss
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).eval()
    loss = adapted(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, expected)  # an adapter starts without effect
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pad_token_that_ends_texts_has_an_embedding_that_learns(tied):
    """As an end-of-sequence token it is context that the model must be able to tell from nothing."""
    torch.manual_seed(0)
    model = VMDForMaskedDiffusion(tiny_config(pad_token_id=9, eos_token_id=9, latent_size=0, tie_word_embeddings=tied))
    embedding = model.get_input_embeddings().weight
    assert embedding[9].abs().max() > 0
    # Only what the embedding does as an input: the logits of a fixed vector do not enter.
    model.model(torch.tensor([[1, 9, MASK]])).last_hidden_state[0, 2].square().mul(torch.arange(32)).sum().backward()
    assert embedding.grad[9].abs().max() > 0


def test_rotary_positions_alone_cannot_tell_masked_tokens_apart():
    """A known limit, and why they are not the default: attention over equal values gives the same value everywhere,
    whatever its weights."""
    model, canvas, z = tiny_model(**POSITIONS["rotary"]), torch.full((1, 5), MASK), normal(1, 4)
    logits = model(canvas, latents=z).logits[0, :, :MASK]
    torch.testing.assert_close(logits, logits[:1].expand(5, -1), rtol=1e-5, atol=1e-5)
    # One visible token is enough to break the tie.
    canvas[0, 0] = 3
    logits = model(canvas, latents=z).logits[0, 1:, :MASK]
    assert (logits - logits[:1]).abs().max() > 1e-2


def test_the_default_positions_tell_masked_tokens_apart():
    assert VMDConfig().position_embedding_type == tiny_config().position_embedding_type
    logits = tiny_model()(torch.full((1, 5), MASK)).logits[0, :, :MASK]
    for first, second in itertools.combinations(logits, 2):
        assert (first - second).abs().max() > 1e-2
