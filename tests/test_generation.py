"""Settings of `generate`, saved and given, and what it does with wrong ones. (What it generates: see
test_block_generation.py.)"""

import pytest
import torch
from helpers import MASK, PAD, StopOnce, normal, padded, seeded, tiny_model
from transformers import StoppingCriteriaList, TextIteratorStreamer

from vmd_hf import VMDForMaskedDiffusion, VMDGenerateOutput, VMDGenerationConfig
from vmd_hf.canvas_vmd import EndOfText
from vmd_hf.data.characters import character_tokenizer
from vmd_hf.sampling_vmd import warp

SURE_RULES = ("top_prob", "top_prob_margin", "entropy")
# Four, two, five and no masks.
ROWS = [[MASK, 1, MASK, MASK, 2, MASK], [3, MASK, MASK], [MASK, MASK, 6, MASK, MASK, MASK], [0, 4]]


def small_model(**changes):
    return tiny_model(**({"position_embedding_type": "learned", "latent_size": 3} | changes))


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


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 3}, {"temperature": 2.0, "top_p": 0.8}])
def test_sampled_tokens_have_the_probabilities_of_the_warped_distribution(settings):
    model, num_samples = small_model(), 4000
    row, latents, settings = torch.tensor([[1, MASK, 5]]), normal(1, 3), {"do_sample": True, **settings}
    logits = warp(model(input_ids=row, latents=latents).logits[0, 1:2], VMDGenerationConfig(**settings))
    rows, latents = row.expand(num_samples, 3), latents.expand(num_samples, 3)
    output = model.generate(rows, latents=latents, generator=seeded(0), **settings)
    counts, expected = torch.bincount(output[:, 1], minlength=12), num_samples * logits[0].softmax(-1)
    likely = expected > 0
    assert counts[~likely].sum() == 0 and likely.sum() > 1
    chi_square = ((counts - expected).square() / expected)[likely].sum()
    assert chi_square < 34  # the 99.99 % quantile of chi-square with 9 degrees of freedom is 33.7


def test_top_k_one_is_greedy_and_leaves_the_confidence_alone():
    # The remasking rules see the unchanged distribution: under the warped one all positions would be equally sure.
    model, (ids, mask), latents = small_model(), padded(ROWS), normal(4, 3)
    for rule in SURE_RULES:
        sampled = model.generate(ids, mask, latents=latents, remasking=rule, do_sample=True, top_k=1)
        assert torch.equal(sampled, model.generate(ids, mask, latents=latents, remasking=rule))


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
def test_wrong_settings_are_errors_that_name_them(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model().generate(torch.tensor([[1, MASK]]), **settings)
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
def test_wrong_inputs_are_errors_that_name_them(arguments, message):
    inputs = {"input_ids": torch.tensor([[1, MASK], [MASK, 2]])} | arguments
    with pytest.raises(ValueError, match=message):
        small_model().generate(**inputs)


def test_latents_for_a_model_without_a_latent_are_an_error():
    with pytest.raises(ValueError, match=r"latents.*latent_size = 0"):
        small_model(latent_size=0).generate(torch.tensor([[1, MASK]]), latents=torch.zeros(1, 0))


def test_a_model_without_a_mask_token_cannot_generate():
    with pytest.raises(ValueError, match="mask_token_id"):
        small_model(mask_token_id=None).generate(torch.tensor([[1, MASK]]))
