"""Checkpoints of version 0.7 load."""

import json

import pytest
import torch
from helpers import MASK, PAD, digits, normal, randomise, tiny_config, tiny_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig

from vmd_hf import VMDConfig, VMDForMaskedDiffusion

GROUPS = {"position_embedding_type": "none", "position_groups": [[i // 4 for i in range(16)]]}


def bert_model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertConfig(vocab_size=12, max_position_embeddings=16, pad_token_id=PAD, **sizes)
    masked_lm = AutoModelForMaskedLM.from_config(bert)
    settings = {"latent_size": 4, "mask_token_id": MASK, "kl_warmup_steps": 5}
    return randomise(VMDForMaskedDiffusion.from_masked_lm(masked_lm, **settings)).eval()


MODELS = {
    "layers": lambda: tiny_model(kl_warmup_steps=5),
    "groups": lambda: tiny_model(kl_warmup_steps=5, **GROUPS),
    "layers and positions": lambda: tiny_model(kl_warmup_steps=5, latent_input="layers_and_positions", block_size=4),
    "position slices": lambda: tiny_model(kl_warmup_steps=5, latent_input="position_slices", latent_size=32),
    "learned prior": lambda: tiny_model(kl_warmup_steps=5, block_size=4, prior="learned", tie_word_embeddings=False),
    "no latent": lambda: tiny_model(latent_size=0),
    "bert": bert_model,
}


def save_as_0_7(model, folder):
    """One map with a bias made the changes of all layers, and of the inputs; the warm-up's counter stood alone."""
    config, state = model.config, dict(model.state_dict())
    state["kl_warmup_progress"] = state.pop("latent_encoder.kl_warmup_progress", torch.tensor(0))
    names = [f"model.layers.{index}.modulation.weight" for index in range(config.num_hidden_layers)]
    names += ["model.position_inputs.weight", "model.modulation.weight"]
    if maps := [state.pop(name) for name in names if name in state]:
        state["model.modulation.weight"], bias = torch.cat(maps).split([config.conditioning_size, 1], dim=1)
        state["model.modulation.bias"] = bias.squeeze(1)
    if config.tie_word_embeddings and config.backbone_config is None:
        del state["lm_head.weight"]
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    values = json.loads(config.to_json_string(use_diff=False))
    latent_input = values.pop("latent_input")
    values |= {
        "architectures": ["VMDForMaskedDiffusion"],
        "conditioner_initializer_range": None,
        "free_bits": 0.0,
        "latent_encoder_pooling": "mean",
        "latent_per_position": latent_input == "position_slices",
        "latent_position_inputs": latent_input == "layers_and_positions",
    }
    (folder / "config.json").write_text(json.dumps(values))
    generation = {"num_steps": 7, "remasking": "entropy", "transformers_version": "5.24.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_checkpoint_of_version_0_7_loads(name, tmp_path):
    model = MODELS[name]()
    config, ids = model.config, digits(2, 7).masked_fill(torch.arange(7) % 2 == 0, MASK)
    if config.latent_size:
        model.latent_encoder.kl_warmup_progress.fill_(3)
    save_as_0_7(model, tmp_path)
    shape = (2, config.latent_size) if config.block_size is None else (2, 2, config.latent_size)
    z = normal(*shape) if config.latent_size else None
    expected, loss = model(ids, latents=z).logits, model(digits(2, 7), labels=digits(2, 7)).loss
    loaded = {
        "auto": AutoModelForMaskedLM.from_pretrained(tmp_path),
        "field": VMDForMaskedDiffusion.from_pretrained(tmp_path, kl_warmup_steps=0),
        "config": VMDForMaskedDiffusion.from_pretrained(tmp_path, config=VMDConfig.from_pretrained(tmp_path)),
    }
    for how, other in loaded.items():
        assert type(other) is VMDForMaskedDiffusion and not other.training
        torch.testing.assert_close(other(ids, latents=z).logits, expected)
        torch.testing.assert_close(other(digits(2, 7), labels=digits(2, 7)).loss, loss)
        assert other.config.latent_input == config.latent_input
        assert other.config.kl_warmup_steps == (0 if how == "field" else config.kl_warmup_steps)
        assert (other.generation_config.num_steps, other.generation_config.remasking) == (7, "entropy")
        if config.latent_size:
            assert other.latent_encoder.kl_warmup_progress == 3
    if config.backbone_config is None:
        denoiser = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(
            denoiser(ids, latents=z).last_hidden_state, model.model(ids, latents=z).last_hidden_state
        )
    other.save_pretrained(tmp_path / "today")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "today")
    torch.testing.assert_close(again(ids, latents=z).logits, expected)


def test_what_no_model_has_any_more_is_an_error(tmp_path):
    values = tiny_config().to_dict() | {"latent_encoder_pooling": "concat", "transformers_version": "5.24.0"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"latent_encoder_pooling='concat' of version 0\.7 is no longer supported"):
        VMDConfig.from_pretrained(tmp_path)
