from functools import partial
from itertools import product

import helpers
import pytest
import torch
from helpers import StopOnce, normal, seeded
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
)

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, VMDGenerateOutput, VMDGenerationConfig
from vmd_hf.canvas_vmd import EndOfText, PrefixStreamer, prepare_canvas
from vmd_hf.data.characters import character_tokenizer
from vmd_hf.generation_configuration_vmd import REMASKING_RULES

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


@pytest.mark.parametrize(
    "eos, pad, expected",
    [
        (2, PAD, [[2, 1, 0, 2, PAD, PAD], [1, 1, 0, 5, 5, 2], [0, 1, 2, PAD, PAD, PAD]]),
        ([5, 2], PAD, [[2, 1, 0, 2, PAD, PAD], [1, 1, 0, 5, PAD, PAD], [0, 1, 2, PAD, PAD, PAD]]),
        ([5, 2], None, [[2, 1, 0, 2, 5, 5], [1, 1, 0, 5, 5, 5], [0, 1, 2, 5, 5, 5]]),
    ],
)
def test_padding_after_the_first_end_of_sequence_among_new_tokens(eos, pad, expected):
    sequences = torch.tensor([[2, 1, 0, 2, 3, 2], [1, 1, 0, 5, 5, 2], [0, 1, 2, 2, 5, 4]])
    end_of_text = EndOfText(
        VMDGenerationConfig(max_new_tokens=4, eos_token_id=eos, pad_token_id=pad), torch.device("cpu")
    )
    assert end_of_text.pad_after(sequences).tolist() == expected


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
    model = small_model(seed=11, vocab_size=4, mask_token_id=3, pad_token_id=None, num_hidden_layers=1)
    for layer in model.model.layers:
        layer.modulation.weight *= 6
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


RANDOM_SETTINGS = {"do_sample": True, "remasking": "random", "num_steps": 3}


def test_a_model_without_a_latent_generates():
    model = small_model(latent_size=0)
    ids, mask = padded(ROWS)
    output = model.generate(ids, mask, num_steps=1, return_dict_in_generate=True)
    assert output.latents is None
    expected = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    assert torch.equal(output.sequences, torch.where((ids == MASK) & (mask == 1), expected, ids))
    sampled = model.generate(ids, mask, generator=seeded(0), resample_latents=True, **RANDOM_SETTINGS)
    assert not (sampled == MASK).any()


# --- continuing prompts ----------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_continued(model):
    latents = normal(2, 3)
    output = model.generate(torch.empty(2, 0, dtype=torch.long), max_new_tokens=4, latents=latents)
    assert torch.equal(output, model.generate(torch.full((2, 4), MASK), latents=latents))


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


# --- processors, stopping, streaming ---------------------------------------------------------------------------------


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
        ({"corrector": "loop"}, "corrector must be one of"),
        ({"corrector": "cap", "corrector_strength": 0.0}, "corrector_strength"),
        ({"corrector": "cap", "corrector_strength": 1.5}, "corrector_strength"),
        ({"corrector": "rescale", "confidence_threshold": 0.5}, "corrector.*confidence_threshold"),
        ({"guidance_scale": -0.5}, "guidance_scale"),
        ({"cache_implementation": "offloaded"}, "cache_implementation must be one of"),
        ({"cache_implementation": None}, "cache_implementation must be one of"),
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
