"""Masked language models of transformers as denoisers."""

import copy
import os

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .blocks_vmd import Layout
from .configuration_vmd import VMDConfig
from .denoiser_vmd import VMDDenoiser, VMDModelOutput
from .latents_vmd import VMDConditioner
from .layers_vmd import VMDZeroLinear


class PassThrough(nn.Module):
    """In an encoder's place: what comes in is what it would have put out."""

    def forward(self, *args, inputs_embeds=None, **kwargs):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class VMDBackbone(VMDDenoiser):
    """The denoiser made of another masked language model of transformers. What z encodes is added to the token
    embeddings; nothing, as long as the weights that read it are zero."""

    def __init__(self, config: VMDConfig):
        super().__init__(config)
        self.masked_lm = AutoModelForMaskedLM.from_config(config.backbone_config)
        self.conditioner = VMDConditioner(config) if config.gaussian_size else None
        size = config.conditioning_size + 1, config.hidden_size
        self.modulation = VMDZeroLinear(*size, bias=False) if config.gaussian_size else None
        self.latent_prior = None
        self.rotary_emb = LlamaRotaryEmbedding(config)  # of the latent encoder
        self.post_init()

    def get_input_embeddings(self):
        return self.masked_lm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.masked_lm.set_input_embeddings(value)

    def embeddings(self, input_ids, position_ids):
        return self.get_input_embeddings()(input_ids)

    def lay_out(self, input_ids, attention_mask=None, position_ids=None) -> Layout:
        """Rows all start at column 0, where the backbone begins to count its positions."""
        if position_ids is not None:
            raise ValueError("position_ids must be None with a backbone, which counts for itself")
        layout = super().lay_out(input_ids, attention_mask)
        if layout.real is not None:
            layout.columns = layout.position_ids.masked_fill(~layout.real, layout.width)
            layout.position_ids = torch.arange(layout.width, device=input_ids.device).expand_as(input_ids)
            layout.real = layout.scatter(layout.real, False)
        return layout

    def run(self, input_ids, layout, conditioning=None, context=None, clean=False, **kwargs) -> VMDModelOutput:
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if conditioning is not None:
            inputs_embeds = inputs_embeds + self.modulation(conditioning)
        real = None if layout.real is None else layout.real.long()
        outputs = self.masked_lm.base_model(inputs_embeds=inputs_embeds, attention_mask=real, **kwargs)
        return VMDModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) to (..., vocab_size): the whole masked language model but for its encoder."""
        head = copy.copy(self.masked_lm)
        head._modules = {**self.masked_lm._modules, self.masked_lm.base_model_prefix: PassThrough()}
        logits = head(inputs_embeds=hidden_states.flatten(0, -2)[None], return_dict=True).logits
        return logits.view(*hidden_states.shape[:-1], -1)


def load_masked_lm(model: str | os.PathLike, mask_token_id: int | None) -> tuple[PreTrainedModel, int]:
    """A masked language model from its folder or Hub id, and its mask token, default: that of its tokenizer.

    Raises:
        ValueError: for a tokenizer that does not fit the model.
    """
    backbone = AutoModelForMaskedLM.from_pretrained(model)
    if mask_token_id is None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        mask_token_id, size = tokenizer.mask_token_id, backbone.config.vocab_size
        # Where there are no files of one, transformers makes up a tokenizer that has special tokens only.
        invented = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
        if mask_token_id is None or invented or len(tokenizer) > size:
            raise ValueError(
                f"the tokenizer beside {model} must be the model's own, of at most {size} tokens and a mask token, "
                f"got {len(tokenizer)} tokens and mask token {tokenizer.mask_token!r}: put its files there, or give "
                "mask_token_id"
            )
    return backbone, mask_token_id


def backbone_settings(model: PreTrainedModel) -> dict:
    """Fields of [`VMDConfig`] that follow from a masked language model.

    Raises:
        ValueError: for a model without an encoder and an output embedding, or with narrow token embeddings.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(
            f"model must be a masked language model with an encoder and a head, got {type(model).__name__}"
        )
    backbone = model.config
    width = model.get_input_embeddings().embedding_dim
    if width != backbone.hidden_size:
        raise ValueError(
            "model must have token embeddings as wide as its hidden states, got "
            f"{width} and {backbone.hidden_size} ({type(model).__name__})"
        )
    longest = [backbone.max_position_embeddings]
    for name, table in model.base_model.named_modules():
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings"):
            offset = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from there
            longest.append(table.num_embeddings - offset)
    return {
        "backbone_config": backbone,
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.hidden_size,
        "num_hidden_layers": backbone.num_hidden_layers,
        "num_attention_heads": backbone.num_attention_heads,
        "max_position_embeddings": min(longest),
        "pad_token_id": backbone.pad_token_id,
        "position_embedding_type": "rotary",  # of the latent encoder
    }


__all__ = ["VMDBackbone", "backbone_settings", "load_masked_lm"]
