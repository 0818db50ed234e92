"""Language models of transformers, masked or causal, as denoisers.

Whole sequences are what a masked language model reads anyway. With blocks, any model will do that takes

- a mask of which token attends to which, (batch, 1, queries, keys), as `attention_mask`, and `position_ids`: so packed
  documents, padding on any side and all the patterns of block diffusion are settled here, and none of its code is
  copied;
- a cache of transformers, from which its layers get the keys and values of clean tokens that were read before.

A pass over a noisy block reads such a cache and leaves nothing in it.

The clean tokens of a masked language model see all of their block. Those of a causal one see nothing on their right,
so that they are read as they were in its training, the next-token loss on them (`causal_loss_weight`) remains what it
was, and blocks of one token are the causal model itself. Noisy tokens see all of their block in both.

With `token_shift` the hidden state before a token predicts it: the noisy one in the block, and for the first token of
a block the clean one at the end of the block before. The first token of a document has nothing before it and is
predicted from its own mask's state, for which the causal model was not trained: begin documents with a token that is
context (a BOS token with the label -100).

A diffusion model whose code is on the Hub (LLaDA, Dream, SDAR) goes where a masked language model goes: load it with
`trust_remote_code=True` and give the object to `from_masked_lm`, with its mask token. Its `base_model` must take
`inputs_embeds`, the two arguments above and the cache by transformers' names, and its head must make logits of
`last_hidden_state`; where remote code has other names, a subclass that translates them will do (this is tested with a
class of our own, not with theirs). LLaDA and SDAR predict a mask from its own hidden state, Dream from the one before
(`token_shift=True`). To load what was saved, the class must be known: `AutoConfig.register(...)` and
`AutoModelForMaskedLM.register(...)`.
"""

import copy
import inspect
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from .blocks_vmd import (
    CleanContext,
    Layout,
    block_attention_mask,
    join_token_indices,
    shift_right,
    states_before_blocks,
)
from .configuration_vmd import VMDConfig
from .denoiser_vmd import VMDDenoiser, VMDModelOutput
from .latents_vmd import VMDConditioner
from .layers_vmd import VMDZeroLinear, append

AUTO_CLASSES = {"masked_lm": AutoModelForMaskedLM, "causal_lm": AutoModelForCausalLM}
CACHE_NAMES = "cache", "past_key_values"  # of models' arguments; the second one before transformers 5.24
MASK_TOKEN = "[MASK]"


@dataclass
class EncoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """With all that the heads of language models ask for."""

    router_logits: tuple[torch.Tensor, ...] | None = None


class PassThrough(nn.Module):
    """In an encoder's place: what comes in is what it would have put out."""

    def forward(self, *args, inputs_embeds=None, **kwargs):
        return EncoderOutput(last_hidden_state=inputs_embeds)


class ContextLayer(DynamicLayer):
    """A layer of a cache that is read and not written: those of this pass are put beside it, in `new`."""

    def __init__(self, context: CleanContext, index: int):
        super().__init__()
        self.new = None
        self.room = (None, None) if context.room is None else context.room[index]
        if context.keys_values is not None:
            self.keys, self.values = context.keys_values[index]
            self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.new = key_states, value_states
        return tuple(map(append, (self.keys, self.values), self.new, self.room))


class VMDBackbone(VMDDenoiser):
    """The denoiser made of another language model of transformers. What z encodes is added to the token embeddings;
    nothing, as long as the weights that read it are zero.

    Args:
        config: Whose `backbone_config` says which model, and `backbone_type` of which kind.
        language_model: That model, if there is one already.
    """

    def __init__(self, config: VMDConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        if language_model is None:
            language_model = AUTO_CLASSES[config.backbone_type].from_config(config.backbone_config)
        else:
            for module in language_model.modules():
                module._is_hf_initialized = True  # its weights are kept
        setattr(self, config.backbone_type, language_model)
        self.position_offset = first_position(language_model)
        self.cache_name = name_of_cache(language_model)
        self.conditioner = VMDConditioner(config) if config.gaussian_size else None
        size = config.conditioning_size + 1, config.hidden_size
        self.modulation = VMDZeroLinear(*size, bias=False) if config.gaussian_size else None
        self.latent_prior = None
        self.rotary_emb = LlamaRotaryEmbedding(config)  # of the latent encoder
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        """The attribute `masked_lm` or `causal_lm`."""
        return getattr(self, self.config.backbone_type)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def embeddings(self, input_ids, position_ids):
        return self.get_input_embeddings()(input_ids)

    def lay_out(self, input_ids, attention_mask=None, position_ids=None) -> Layout:
        """As everywhere; whole sequences all start at column 0, where the backbone begins to count its positions."""
        if self.config.block_size is not None:
            return super().lay_out(input_ids, attention_mask, position_ids)
        if position_ids is not None:
            raise ValueError(
                "position_ids must be None with a backbone and block_size None, which counts for itself: pack "
                "documents with block_size"
            )
        layout = super().lay_out(input_ids, attention_mask)
        if layout.real is not None:
            layout.columns = layout.position_ids.masked_fill(~layout.real, layout.width)
            layout.position_ids = torch.arange(layout.width, device=input_ids.device).expand_as(input_ids)
            layout.real = layout.scatter(layout.real, False)
        return layout

    def run(self, input_ids, layout, conditioning=None, context=None, clean=False, **kwargs) -> VMDModelOutput:
        if self.config.block_size is not None:
            return self.run_blocks(input_ids, layout, conditioning, context, clean, **kwargs)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if conditioning is not None:
            inputs_embeds = inputs_embeds + self.modulation(conditioning)
        real = None if layout.real is None else layout.real.long()
        outputs = self.language_model.base_model(inputs_embeds=inputs_embeds, attention_mask=real, **kwargs)
        return VMDModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def run_blocks(
        self, input_ids, layout: Layout, conditioning, context: CleanContext | None, clean: bool, **kwargs
    ) -> VMDModelOutput:
        context = context or CleanContext()
        num_new = 0 if context.input_ids is None else context.input_ids.shape[1]
        if num_new:
            input_ids = torch.cat([context.input_ids, input_ids], dim=1)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if conditioning is not None:  # clean tokens have the null latent
            inputs = self.modulation(conditioning).repeat_interleave(layout.width, dim=1)
            inputs_embeds = inputs_embeds + nn.functional.pad(inputs, (0, 0, num_new, 0))

        # Layers that are checkpointed get no cache from transformers: then clean tokens are read in every pass.
        recomputed = self.training and torch.is_grad_enabled() and self.is_gradient_checkpointing
        num_layers = self.language_model.config.get_text_config().num_hidden_layers
        layers = [] if recomputed else [ContextLayer(context, index) for index in range(num_layers)]
        if context.attention is None:
            context.attention = self.grid_attention(inputs_embeds, layout, context, clean)
        arguments = kwargs | context.attention | {"use_cache": not recomputed}
        if not recomputed:
            arguments[self.cache_name] = Cache(layers=layers)
        outputs = self.language_model.base_model(inputs_embeds=inputs_embeds, **arguments)
        if any(layer.new is None for layer in layers):
            raise ValueError(
                "block_size must be None with a backbone unless all of its layers give keys and values to a cache of "
                f"transformers, got block_size={self.config.block_size} and {type(self.language_model).__name__}"
            )
        num_clean = input_ids.shape[1] if clean else num_new
        hidden_states, before = outputs.last_hidden_state, context.before
        if self.config.token_shift and before is None and num_clean:
            places = layout.token_index(clean=True) if clean else context.new
            before = states_before_blocks(hidden_states[:, :num_clean], places, layout)
        hidden_states = hidden_states[:, num_new:]
        if self.config.token_shift and not clean:
            hidden_states = shift_right(hidden_states, before, layout)
        return VMDModelOutput(
            last_hidden_state=hidden_states,
            keys_values=tuple(tuple(part[:, :, :num_clean] for part in layer.new) for layer in layers) or None,
            before=before,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def grid_attention(self, inputs_embeds, layout: Layout, context: CleanContext, clean: bool) -> dict:
        """Which token of a pass attends to which, and where they stand, as the language model's arguments."""
        position_ids, query = layout.position_ids, layout.token_index(clean)
        if context.new is not None:
            position_ids = torch.cat([context.position_ids, position_ids], dim=1)
            query = join_token_indices([context.new, query])
        key = query if context.read is None else join_token_indices([context.read, query])
        mask = block_attention_mask(self.language_model.config, query, key, inputs_embeds.dtype)
        return {"attention_mask": mask, "position_ids": position_ids + self.position_offset}

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) to (..., vocab_size): the whole language model but for its encoder."""
        head = copy.copy(self.language_model)
        head._modules = {**head._modules, head.base_model_prefix: PassThrough()}
        # Not by a call: where accelerate keeps weights elsewhere, that would be one of the whole model.
        logits = type(head).forward(head, inputs_embeds=hidden_states.flatten(0, -2)[None], return_dict=True).logits
        return logits.view(*hidden_states.shape[:-1], -1)


def name_of_cache(model: PreTrainedModel) -> str:
    """Of the argument by which a model's encoder takes one. (Some hand it on to their layers without a look.)"""
    for function in (model.base_model.forward, LlamaModel.forward):
        parameters = inspect.signature(function).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name


def first_position(model: PreTrainedModel) -> int:
    """The position of a model's first token, which is not 0 where its position table has a row for padding."""
    return max((table.padding_idx + 1 for table in position_tables(model) if table.padding_idx is not None), default=0)


def position_tables(model: PreTrainedModel) -> list[nn.Embedding]:
    modules = model.base_model.named_modules()
    return [part for name, part in modules if isinstance(part, nn.Embedding) and name.endswith("position_embeddings")]


def load_language_model(
    model: str | os.PathLike, backbone_type: str, mask_token_id: int | None
) -> tuple[PreTrainedModel, int, PreTrainedTokenizerBase | None]:
    """A language model from its folder or Hub id, its mask token, by default that of its tokenizer, and the tokenizer
    if a causal one was given a mask token here.

    Raises:
        ValueError: for a tokenizer that does not fit the model.
    """
    backbone = AUTO_CLASSES[backbone_type].from_pretrained(model)
    if mask_token_id is not None:
        return backbone, mask_token_id, None
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = backbone.config.vocab_size
    causal = backbone_type == "causal_lm"
    # Where there are no files of one, transformers makes up a tokenizer that has special tokens only.
    invented = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    if invented or len(tokenizer) > size or not (causal or tokenizer.mask_token_id is not None):
        raise ValueError(
            f"the tokenizer beside {model} must be the model's own, of at most {size} tokens"
            f"{'' if causal else ' and a mask token'}, got {len(tokenizer)} tokens and mask token "
            f"{tokenizer.mask_token!r}: put its files there, or give mask_token_id"
        )
    if tokenizer.mask_token_id is not None:
        return backbone, tokenizer.mask_token_id, None
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    add_mask_token(backbone, tokenizer.mask_token_id)
    return backbone, tokenizer.mask_token_id, tokenizer


@torch.no_grad()
def add_mask_token(model: PreTrainedModel, mask_token_id: int) -> None:
    """Makes the mean of all token embeddings that of the mask token, a row that no token has or one more."""
    size = model.get_input_embeddings().num_embeddings
    if mask_token_id >= size:
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[mask_token_id] = table.weight[:size].float().mean(0).to(table.weight.dtype)


def backbone_settings(model: PreTrainedModel, backbone_type: str, with_blocks: bool) -> dict:
    """Fields of [`VMDConfig`] that follow from a language model.

    Raises:
        ValueError: for a model without an encoder and an output embedding, or with narrow token embeddings; and with
            blocks, for one that takes no `position_ids`, or has other layers than attention.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(
            f"model must be a {backbone_type.split('_')[0]} language model with an encoder and a head, got "
            f"{type(model).__name__}"
        )
    backbone = model.config
    width = model.get_input_embeddings().embedding_dim
    if width != backbone.hidden_size:
        raise ValueError(
            "model must have token embeddings as wide as its hidden states, got "
            f"{width} and {backbone.hidden_size} ({type(model).__name__})"
        )
    if with_blocks:
        layer_types = set(getattr(backbone, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if layer_types or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise ValueError(
                "model must take position_ids and have layers of attention only with block_size, got "
                f"{type(model).__name__} with {', '.join(sorted(layer_types)) or 'no position_ids'}"
            )
    longest = [backbone.max_position_embeddings]
    longest += [table.num_embeddings - first_position(model) for table in position_tables(model)]
    if with_blocks and (window := getattr(backbone, "sliding_window", None)):
        longest.append(window)  # the mask given to it has no window: up to here, neither has its own
    settings = {
        "backbone_config": copy.deepcopy(backbone),  # for it is made to agree with the config that it is part of
        "backbone_type": backbone_type,
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.hidden_size,
        "num_hidden_layers": backbone.num_hidden_layers,
        "num_attention_heads": backbone.num_attention_heads,
        "max_position_embeddings": min(longest),
        "pad_token_id": backbone.pad_token_id,
        "tie_word_embeddings": backbone.tie_word_embeddings,
        "position_embedding_type": "rotary",  # of the latent encoder
    }
    return settings | ({"eos_token_id": backbone.eos_token_id} if backbone_type == "causal_lm" else {})


__all__ = ["MASK_TOKEN", "VMDBackbone", "add_mask_token", "backbone_settings", "load_language_model"]
