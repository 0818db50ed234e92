import json

import pytest
from helpers import tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from vmd_hf import VMDConfig

# Which class the error has is a test of its own below; these are about the rule and its message.
CONFIG_ERRORS = (ValueError, StrictDataclassError)

BROKEN_RULES = [
    ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads.*30 and 4"),
    ({"hidden_size": 20}, "must be even with rotary positions.*20 / 4"),
    ({"vocab_size": 0, "mask_token_id": None, "pad_token_id": None}, "vocab_size.*got 0"),
    ({"hidden_size": 0}, "hidden_size.*got 0"),
    ({"hidden_size": -32}, "hidden_size.*got -32"),
    ({"num_attention_heads": 0}, "num_attention_heads.*got 0"),
    ({"intermediate_size": 0}, "intermediate_size.*got 0"),
    ({"kl_weight": float("nan")}, "kl_weight must be finite.*got nan"),
    ({"loop_loss": True}, "loop_loss.*num_loops.*got 1"),
    ({"conditioning_size": 0}, "conditioning_size.*got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers.*got 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings.*got 0"),
    (
        {"latent_input": "layers_and_positions", "latent_size": 0},
        "latent_input='layers_and_positions' needs a Gaussian latent and no backbone",
    ),
    (
        {"latent_input": "position_slices", "latent_size": 0},
        "latent_input='position_slices' needs a Gaussian latent and no backbone",
    ),
    ({"latent_input": "position_slices", "latent_size": 15}, "multiple of the positions, 16, .* got 15"),
    ({"latent_input": "position_slices", "latent_size": 6, "block_size": 4}, "multiple of the positions, 4, .* got 6"),
    ({"num_latent_encoder_layers": 0}, "num_latent_encoder_layers.*got 0"),
    ({"latent_size": -1}, "latent_size.*got -1"),
    ({"block_size": 0}, "block_size must be None.*or at least 1, got 0"),
    ({"hidden_act": "no_such_act"}, "hidden_act.*'no_such_act'"),
    ({"position_embedding_type": "absolute"}, "(?s)position_embedding_type.*absolute"),
    ({"objective": "elbo"}, "(?s)objective.*elbo"),
    ({"position_groups": [[0] * 16, [0] * 15]}, "position_groups.*16.*got 15"),
    ({"position_groups": [[0] * 15 + [-1]]}, "position_groups.*got -1"),
    ({"position_group_bias": True}, "position_group_bias needs position_groups and whole sequences, got"),
    ({"objective_steps": []}, r"objective_steps.*got \[\]"),
    ({"objective_steps": [2, 0]}, r"objective_steps.*got \[2, 0\]"),
    ({"kl_weight": -0.5}, "kl_weight.*got -0.5"),
    ({"objective_draws": 4}, "VMDConfig knows no argument 'objective_draws'"),
    ({"latent_min_tokens": 2}, 'latent_min_tokens must be at least 1, and 1 unless objective is "per_step"'),
    ({"kl_warmup_steps": -1}, "kl_warmup_steps.*got -1"),
    ({"initializer_range": -0.02}, "initializer_range.*got -0.02"),
    ({"attention_dropout": 1.0}, "attention_dropout.*got 1.0"),
    ({"hidden_dropout": -0.1}, "hidden_dropout.*got -0.1"),
    ({"time_epsilon": 0.0}, "time_epsilon.*got 0.0"),
    ({"time_epsilon": 1.0}, "time_epsilon.*got 1.0"),
    ({"time_epsilon": float("nan")}, "time_epsilon.*got nan"),
    ({"mask_token_id": 12}, "mask_token_id.*vocab_size = 12.*got 12"),
    ({"mask_token_id": -1}, "mask_token_id.*got -1"),
    ({"pad_token_id": 12}, "pad_token_id.*got 12"),
    ({"eos_token_id": 12}, "eos_token_id.*got 12"),
    ({"eos_token_id": [3, 12]}, "eos_token_id.*got 12"),
    ({"mask_token_id": 11}, "mask_token_id must differ.*got 11"),
    ({"eos_token_id": [3, 10]}, "mask_token_id must differ.*got 10"),
    ({"hidden_size": "32"}, "(?s)hidden_size.*32"),
    ({"latnt_size": 4}, "'latnt_size'"),
    ({"objektive": "vmd", "another": 1}, "'another', 'objektive'"),
]


@pytest.mark.parametrize("overrides, message", BROKEN_RULES)
def test_a_broken_rule_names_the_argument_and_the_value(overrides, message):
    with pytest.raises(CONFIG_ERRORS, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize("overrides", [{"hidden_size": 30}, {"mask_token_id": 12}, {"objective": "elbo"}])
def test_a_broken_rule_is_a_value_error(overrides):
    with pytest.raises(ValueError):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"position_embedding_type": "learned", "hidden_size": 20},  # an odd head size needs no rotary angles
        {"latent_size": 0, "kl_weight": 0},  # whole numbers are fine for weights
        {"mask_token_id": 0, "pad_token_id": None},  # 0 is an id like any other
        {"mask_token_id": None},
        {"pad_token_id": 9, "eos_token_id": 9},
        {"attention_dropout": 0, "hidden_dropout": 0.5},
        {"objective_steps": [7]},
        {
            "position_embedding_type": "none",
            "position_groups": [[i // 4 for i in range(16)], [i % 4 for i in range(16)]],
        },
    ],
)
def test_the_edges_of_the_rules_are_allowed(overrides):
    config = tiny_config(**overrides)
    for name, value in overrides.items():
        assert getattr(config, name) == value


def test_intermediate_size_defaults_to_four_times_the_width():
    assert tiny_config(intermediate_size=None).intermediate_size == 128
    assert tiny_config(intermediate_size=48).intermediate_size == 48


@pytest.mark.parametrize(
    "special, forbidden",
    [
        ({}, [10, 11]),
        ({"mask_token_id": 3, "pad_token_id": 1}, [1, 3]),
        ({"pad_token_id": None}, [10]),
        ({"mask_token_id": None, "pad_token_id": None}, []),
        ({"pad_token_id": 9, "eos_token_id": 9}, [10]),  # a pad token that ends texts has to be predicted
        ({"pad_token_id": 9, "eos_token_id": [8, 9]}, [10]),
        ({"eos_token_id": [8, 9]}, [10, 11]),
    ],
)
def test_forbidden_tokens(special, forbidden):
    assert tiny_config(**special).forbidden_token_ids == forbidden


def test_save_and_load_round_trip(tmp_path):
    config = tiny_config(
        objective="per_step",
        objective_steps=(3, 1),
        kl_weight=2,
        eos_token_id=[8, 9],
        position_embedding_type="none",
        position_groups=[[i // 4 for i in range(16)]],
        time_epsilon=1e-4,
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["objective_steps"] == [3, 1]
    for loaded in (VMDConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is VMDConfig
        assert loaded.to_json_string() == config.to_json_string()
        assert loaded.objective_steps == [3, 1]
        assert loaded.position_groups == [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4]


@pytest.mark.parametrize("steps", [(1, 2, 4), [1, 2, 4]])
def test_objective_steps_become_a_list(steps):
    assert tiny_config(objective_steps=steps).objective_steps == [1, 2, 4]
    assert tiny_config().objective_steps == [1, 2, 4]


def test_objective_steps_do_not_share_the_list_that_was_given():
    steps = [1, 2]
    config = tiny_config(objective_steps=steps)
    steps.append(0)
    assert config.objective_steps == [1, 2]


def test_a_file_of_another_version_may_hold_unknown_names(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text()) | {"name_of_the_future": 3, "transformers_version": "9.0.0"}
    file.write_text(json.dumps(content))
    assert VMDConfig.from_pretrained(tmp_path).to_dict()["latent_size"] == 4


def test_a_file_written_by_hand_may_not_hold_unknown_names(tmp_path):
    content = tiny_config().to_dict() | {"latnt_size": 3}
    del content["transformers_version"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'latnt_size'"):
        VMDConfig.from_pretrained(tmp_path)


def test_loading_a_broken_value_is_an_error(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token_id": 99}))
    with pytest.raises(CONFIG_ERRORS, match=r"mask_token_id.*got 99"):
        VMDConfig.from_pretrained(tmp_path)


def test_an_assigned_value_is_checked_when_the_config_is_saved(tmp_path):
    config = tiny_config()
    config.kl_weight = -1.0
    with pytest.raises(CONFIG_ERRORS, match=r"kl_weight.*got -1.0"):
        config.save_pretrained(tmp_path)


def test_the_config_of_another_model_type_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "transformers_version": "5.0.0"}))
    with pytest.raises(ValueError, match="bert"):
        VMDConfig.from_pretrained(tmp_path)
