"""transformers' own common tests, on small models of every kind."""

import copy
import unittest
from unittest.mock import patch

import pytest
import transformers_tests
from helpers import PAD, tiny_config
from transformers import BertConfig, LlamaConfig

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, VMDModel

modeling_tests = transformers_tests.load("test_modeling_common")
ConfigTester = transformers_tests.load("test_configuration_common").ConfigTester
VOCABULARY = 40  # their tests of resizing take 15 tokens away


@pytest.fixture
def deprecations():
    """Their tests use what is deprecated, to see that it still works."""


class ModelTester:
    """What their tests ask for: a config and inputs."""

    batch_size, seq_length, is_training = 3, 8, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, **settings):
        self.settings = settings

    def get_config(self):
        # Rotary positions alone: some of their tests have rows that are longer than a table.
        settings = {"position_embedding_type": "rotary", **copy.deepcopy(self.settings)}
        return tiny_config(vocab_size=VOCABULARY, **settings)

    def prepare_config_and_inputs_for_common(self):
        input_ids = modeling_tests.ids_tensor([self.batch_size, self.seq_length], 10)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": input_ids.new_ones(input_ids.shape)}


class CommonTests(modeling_tests.ModelTesterMixin):
    all_model_classes = (VMDModel, VMDForMaskedDiffusion)
    settings: dict = {}  # noqa: RUF012
    test_can_init_all_missing_weights_before_2023 = True  # not by the year in the files, which have none

    def setUp(self):
        self.model_tester = ModelTester(**self.settings)
        base_models = patch.dict(modeling_tests.MODEL_MAPPING_NAMES, {VMDConfig.model_type: VMDModel.__name__})
        patches = [base_models]  # which have no loss
        if "backbone_config" not in self.settings:  # they take a config that may hold another for one that does
            patches.append(patch.object(VMDConfig, "sub_configs", {}))
        for each in patches:
            each.start()
            self.addCleanup(each.stop)
        name = self._testMethodName
        reason = DOES_NOT_APPLY.get(name) or DOES_NOT_APPLY.get(f"{type(self).__name__}.{name}")
        if reason is not None:
            self.skipTest(reason)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = copy.deepcopy(inputs_dict)
        if return_labels and model_class is VMDForMaskedDiffusion:
            inputs_dict["labels"] = inputs_dict["input_ids"]  # clean tokens: the model draws the noise
        return inputs_dict

    def test_batching_equivalence(self):
        """Without mask and pad token: theirs takes no logits of minus infinity, which the two always have."""
        self.model_tester.settings |= {"mask_token_id": None, "pad_token_id": None}
        super().test_batching_equivalence()

    def test_resize_tokens_embeddings(self):
        """Without mask and pad token: theirs leaves four tokens, and a vocabulary without these two is an error."""
        self.model_tester.settings |= {"mask_token_id": None, "pad_token_id": None}
        super().test_resize_tokens_embeddings()

    def test_config(self):
        settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
        ConfigTester(self, config_class=VMDConfig, **settings).run_common_tests()


class TestWholeSequences(CommonTests, unittest.TestCase):
    pass


class TestWithoutLatent(CommonTests, unittest.TestCase):
    settings = {"latent_size": 0}  # noqa: RUF012


class TestBlocks(CommonTests, unittest.TestCase):
    settings = {"block_size": 4, "prior": "learned"}  # noqa: RUF012


class TestBackbone(CommonTests, unittest.TestCase):
    all_model_classes = (VMDForMaskedDiffusion,)
    settings = {  # noqa: RUF012
        "backbone_config": BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
            pad_token_id=PAD,
        ).to_dict()
    }


class TestCausalBackbone(CommonTests, unittest.TestCase):
    all_model_classes = (VMDForMaskedDiffusion,)
    settings = {  # noqa: RUF012
        "backbone_config": LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            pad_token_id=PAD,
            tie_word_embeddings=True,
        ).to_dict(),
        "backbone_type": "causal_lm",
        "token_shift": True,
        "block_size": 4,
        "latent_type": "chain",
    }


TWO_CALLS = (
    "it holds one call of a layer a pass, and with blocks there are two; test_blocks.py and test_causal_backbone.py "
    "compare the gradients"
)
DOES_NOT_APPLY = {
    "test_generation_tester_mixin_inheritance": "the tests of autoregressive generation; this one has its own",
    "TestBlocks.test_attention_outputs": "attention weights are those on the grid, of clean and noisy keys",
    "TestBlocks.test_retain_grad_hidden_states_attentions": "hidden states are slices of [clean, noisy]",
    "TestBackbone.test_retain_grad_hidden_states_attentions": "hidden states are gathered from rows without padding",
    "TestBlocks.test_training_gradient_checkpointing": TWO_CALLS,
    "TestBlocks.test_training_gradient_checkpointing_use_reentrant_false": TWO_CALLS,
    "TestBlocks.test_training_gradient_checkpointing_use_reentrant_true": TWO_CALLS,
    "TestCausalBackbone.test_attention_outputs": "attention weights are those on the grid, of clean and noisy keys",
    "TestCausalBackbone.test_retain_grad_hidden_states_attentions": "hidden states are slices of [clean, noisy]",
    "TestCausalBackbone.test_training_gradient_checkpointing": TWO_CALLS,
    "TestCausalBackbone.test_training_gradient_checkpointing_use_reentrant_false": TWO_CALLS,
    "TestCausalBackbone.test_training_gradient_checkpointing_use_reentrant_true": TWO_CALLS,
}


@pytest.mark.parametrize("name", DOES_NOT_APPLY)
def test_what_does_not_apply_is_there(name):
    kind, _, method = name.rpartition(".")
    assert hasattr(globals()[kind or "CommonTests"], method)
