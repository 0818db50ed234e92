"""Variational Masked Diffusion models (arXiv 2510.23606): backbone, latent encoder, and the model with its loss."""

import copy
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils import CONFIG_NAME, ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vmd import VMDConfig
from .generation_vmd import VMDGenerationConfig, VMDGenerationMixin
from .masking_vmd import CleanContext, Layout, block_attention_mask, join_places, lay_out_blocks, row_positions
from .noise_vmd import (
    Corruption,
    corrupt_at_time,
    corrupt_before_step,
    hashed_noise,
    scored_tokens,
    seeded_noise,
    stratified_uniform,
)
from .objective_vmd import draw_latents, gaussian_kl, row_cross_entropy, standardised

# What forward takes beside its own arguments.
_KEYWORDS = {*TransformersKwargs.__annotations__, "return_dict", "use_cache"}

OWN_LOSS = (
    "the model computes its own loss when forward gets labels, and a trainer with a loss of its own, such as TRL's "
    "SFTTrainer, would train next-token prediction; use the plain Trainer, or vmd_hf.training.trl.VMDSFTTrainer"
)

VISIBLE, REVEALED_NOW, STILL_MASKED = 0, 1, 2  # what the latent encoder is told of each token


@dataclass
class VMDMaskedDiffusionOutput(ModelOutput):
    """Output of [`VMDForMaskedDiffusion`].

    Attributes:
        loss: Scalar, `reconstruction_loss + kl_weight * kl`, nats a labelled token. With labels only. (In training
            mode the KL term also carries warm-up and free bits. With several `objective_draws` the loss is lower: it
            has the logarithm of their mean, and the terms are still reported as means over them.)
        logits: (batch, length, vocabulary). Without labels only.
        reconstruction_loss: Scalar, the weighted cross-entropy R of the masked tokens over the number of labelled
            tokens.
        kl: Scalar, the KL term over the same number.
        kl_per_latent: (batch,), with blocks (batch, blocks): unweighted KL(q || p) of each latent in nats; 0 where
            nothing was masked.
        posterior_shift: (batch, latent_size), with blocks (batch, blocks, latent_size): how far the mean of q lies
            from the prior's, in the prior's standard deviations (from N(0, I): the mean itself); 0 where fewer than
            `latent_min_tokens` tokens were revealed.
        hidden_states, attentions: As everywhere in transformers, on request.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    kl_per_latent: torch.Tensor | None = None
    posterior_shift: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain operations, which can also return its weights (batch, heads, queries, keys)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class VMDGroupBias(nn.Linear):
    """What a layer's heads add to the scores of positions that are in the same groups (see `_init_weights`)."""

    def __init__(self, config: VMDConfig):
        super().__init__(len(config.position_groups), config.num_attention_heads, bias=False)

    def forward(self, same_group, attention_mask):
        """(rows, length, length, groupings) and a mask (batch, 1, length, length), bool, float or `None`, to scores
        (rows or batch, heads, length, length) to add."""
        scores = super().forward(same_group).permute(0, 3, 1, 2)
        if attention_mask is None:
            return scores
        if attention_mask.dtype == torch.bool:
            return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        return scores + attention_mask


class VMDAttention(nn.Module):
    def __init__(self, config: VMDConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.group_bias = VMDGroupBias(config) if config.position_group_bias else None

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        context=None,
        same_group=None,
        **kwargs,
    ):
        # context: keys and values of earlier tokens that come before this pass's own, or None
        shape = hidden_states.shape[:-1]
        qkv = self.qkv_proj(hidden_states).view(*shape, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, head_dim)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        own = key, value
        if context is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
        if self.group_bias is not None:
            attention_mask = self.group_bias(same_group, attention_mask).to(query.dtype)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1)), weights, own


class VMDMLP(nn.Module):
    def __init__(self, config: VMDConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class VMDLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer, of which a latent may shift, scale and gate both halves (adaLN)."""

    def __init__(self, config: VMDConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.attention = VMDAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.mlp = VMDMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        modulation=None,
        context=None,
        **kwargs,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The new hidden states, and the layer's keys and values.

        `modulation` (batch, blocks, 6, hidden_size) is this layer's part of `VMDModel.modulation_of`.
        """
        modulation = [None] * 6 if modulation is None else modulation.unbind(-2)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
        update, _, own = self.attention(
            modulate(self.attention_norm(hidden_states), shift_1, scale_1),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            context=context,
            **kwargs,
        )
        hidden_states = add_gated(hidden_states, self.dropout(update), gate_1)
        update = self.mlp(modulate(self.mlp_norm(hidden_states), shift_2, scale_2))
        return add_gated(hidden_states, self.dropout(update), gate_2), own


class VMDZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero."""


def modulate(hidden_states, shift, scale):
    """(batch, length, hidden) with one shift and scale (batch, blocks, hidden) for each of its equal blocks."""
    if scale is None:
        return hidden_states
    if scale.shape[1] == 1:
        return torch.addcmul(shift, hidden_states, scale)
    blocks = hidden_states.unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift[:, :, None], blocks, scale[:, :, None]).flatten(1, 2)


def add_gated(residual, update, gate):
    if gate is None:
        return residual + update
    if gate.shape[1] == 1:
        return torch.addcmul(residual, gate, update)
    shape = (gate.shape[1], -1)
    return torch.addcmul(residual.unflatten(1, shape), gate[:, :, None], update.unflatten(1, shape)).flatten(1, 2)


class VMDPreTrainedModel(PreTrainedModel):
    config_class = VMDConfig
    config: VMDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ("VMDLayer",)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": VMDLayer, "attentions": VMDAttention}  # noqa: RUF012
    _tokenizer_to_save: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any):
        """As everywhere.

        Raises:
            OSError: if there are no weights, or they are not whole.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} are not whole or not in the safetensors format "
                f"({error}): save, copy or download them again"
            ) from error

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As everywhere, but an interruption leaves no half-written file: each is written beside its place and then
        moved, the config last. A config that was loaded with code names none unless the code is saved, too.

        Raises:
            ValueError: if `save_directory` is a file.
        """
        if self._auto_class is None and hasattr(self.config, "auto_map"):
            del self.config.auto_map
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory must not be a file, got {folder}")
        if not is_main_process:
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix="_partial-") as partial:
            self._write_files_beside_weights(folder, Path(partial))
            super().save_pretrained(partial, is_main_process, *args, **kwargs)
            written = sorted(Path(partial).iterdir(), key=lambda path: path.name == CONFIG_NAME)
            for path in written:
                os.replace(path, folder / path.name)
        stale = {path.name for path in folder.iterdir()} - {path.name for path in written}
        for name in filter(re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?").fullmatch, stale):
            if not kwargs.get("variant"):
                (folder / name).unlink()  # of another number of shards

    def _write_files_beside_weights(self, folder: Path, partial: Path) -> None:
        if hasattr(self.config, "custom_pipelines"):
            pipeline = Path(__file__).with_name("pipeline_vmd.py")
            if self._auto_class is not None and pipeline.exists():
                shutil.copy(pipeline, partial)
            elif not (folder / pipeline.name).exists():  # a pipeline that saves itself has written it
                del self.config.custom_pipelines
        if self._tokenizer_to_save is not None:
            self._tokenizer_to_save.save_pretrained(partial)

    def push_to_hub(self, *args, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs):
        """As everywhere; in the same commit go the code, so that it loads anywhere with `trust_remote_code=True`, and
        the tokenizer, if given."""
        with saved_with_code(self, tokenizer):
            return super().push_to_hub(*args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As everywhere; a vocabulary without the tokens that the config names is an error."""
        ids = (self.config.mask_token_id, self.config.pad_token_id, self.config.eos_token_id)
        largest = max((token for token in ids if isinstance(token, int)), default=-1)
        if new_num_tokens is not None and new_num_tokens <= largest:
            raise ValueError(
                f"new_num_tokens must leave mask_token_id, pad_token_id and eos_token_id {ids} in the vocabulary, got "
                f"{new_num_tokens}"
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.backbone_config is not None:
            self.config.backbone_config.vocab_size = self.config.vocab_size
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VMDZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, VMDLatentLinear):
            # z is of unit scale, unlike hidden states behind a norm: keep its variance through the two maps.
            init.normal_(module.weight, std=self.config.conditioner_initializer_range or module.in_features**-0.5)
        elif isinstance(module, VMDPosteriorLinear):
            # z tells much from the start, means of unit scale and little noise: noise is soon learned to be ignored.
            means = torch.randn_like(module.weight.chunk(2)[0]) * module.in_features**-0.5
            init.copy_(module.weight, torch.cat([means, torch.zeros_like(means)]))
            init.copy_(module.bias, torch.tensor([0.0, -3.0]).repeat_interleave(len(means)))
        elif isinstance(module, VMDGroupBias):
            heads, groupings = module.weight.shape
            favourite = torch.arange(heads)[:, None] % (groupings + 1) == torch.arange(groupings)
            init.copy_(module.weight, 4.0 * favourite)  # e^4 times the weight: most of what a head of 81 cells sees
        elif isinstance(module, VMDForMaskedDiffusion):
            init.zeros_(module.kl_warmup_progress)


class VMDEmbeddings(nn.Module):
    """Token embeddings plus whatever position tables the config asks for."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.config = config
        never_real = config.pad_token_id in config.forbidden_token_ids  # a pad token that ends texts must learn
        padding_idx = config.pad_token_id if never_real else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=padding_idx)
        learned = config.position_embedding_type == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        groups = config.position_groups or []
        self.embed_groups = nn.ModuleList(nn.Embedding(max(group) + 1, config.hidden_size) for group in groups)
        if groups:
            self.register_buffer("position_groups", torch.tensor(groups))  # (groupings, max_position_embeddings)

    def forward(self, input_ids, position_ids):
        hidden_states = self.embed_tokens(input_ids)  # (batch, length, hidden)
        if self.embed_positions is None and not self.embed_groups:
            return hidden_states
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        for table, groups in zip(self.embed_groups, self.position_groups if self.embed_groups else (), strict=True):
            hidden_states = hidden_states + table(groups[position_ids])
        return hidden_states


class VMDLatentLinear(nn.Linear):
    """A linear layer with an initialisation of its own (see `VMDPreTrainedModel._init_weights`, which transformers
    calls only for modules that have parameters themselves)."""


class VMDPosteriorLinear(nn.Linear):
    """The same, to means and log-variances."""


class VMDLatentPrior(nn.Module):
    """The learned prior p(z | clean earlier blocks), from the last clean hidden state before a block, or zeros where
    there is none. N(0, I) when training starts."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = nn.SiLU()
        self.out_proj = VMDZeroLinear(config.hidden_size, 2 * config.latent_size)

    def forward(self, before):
        """(..., hidden) to mean and log-variance, each (..., latent_size) float32."""
        before = before.to(self.in_proj.bias.dtype)  # see VMDConditioner
        return self.out_proj(self.act(self.in_proj(before))).float().chunk(2, dim=-1)


class VMDConditioner(nn.Module):
    """Slices of latents, (..., latent_size / slices), to conditioning vectors (..., conditioning_size)."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.in_proj = VMDLatentLinear(config.latent_size // config.num_latent_slices, config.conditioning_size)
        self.out_proj = VMDLatentLinear(config.conditioning_size, config.conditioning_size)
        self.act = nn.SiLU()

    def forward(self, latents):
        # While FSDP has gathered weights, they may be of another type than the model's. Biases are never quantised.
        return self.act(self.out_proj(self.act(self.in_proj(latents.to(self.in_proj.bias.dtype)))))


class VMDModel(VMDPreTrainedModel):
    """The denoiser p_theta(x_0 | x_t, z) up to its hidden states: a transformer conditioned on z, bidirectional or,
    with `block_size`, bidirectional within a block and causal over blocks."""

    _keys_to_ignore_on_load_unexpected = (r"latent_encoder\.", r"lm_head\.", r"kl_warmup_progress")
    has_head = False  # whether it is part of a VMDForMaskedDiffusion

    def __init__(self, config: VMDConfig):
        if config.backbone_config is not None:
            raise ValueError("a model with a backbone_config is a VMDForMaskedDiffusion (AutoModelForMaskedLM)")
        super().__init__(config)
        self.embeddings = VMDEmbeddings(config)
        self.layers = nn.ModuleList(VMDLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.conditioner = VMDConditioner(config) if config.latent_size else None
        # adaLN-zero: a shift, a scale and a gate for each half of each layer; or, and, what is added to inputs. With
        # zero weights it is the identity, so that training starts from a plain masked diffusion model.
        self.num_changes = 0 if config.latent_per_position else config.num_hidden_layers * 6
        has_inputs = config.latent_position_inputs or config.latent_per_position
        self.num_inputs = config.positions_per_latent if has_inputs else 0
        num_vectors = 1 if config.latent_per_position else self.num_changes + self.num_inputs  # of a slice
        size = config.conditioning_size, num_vectors * config.hidden_size
        self.modulation = VMDZeroLinear(*size) if config.latent_size else None
        self.latent_prior = VMDLatentPrior(config) if config.prior == "learned" else None
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.position_embedding_type == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.embed_tokens

    def set_input_embeddings(self, value):
        self.embeddings.embed_tokens = value

    def lay_out(self, input_ids, attention_mask=None, position_ids=None) -> Layout:
        """How the rows are laid out for `run`: as they are, or on a grid of blocks. Checks shapes."""
        check_inputs(input_ids, attention_mask, position_ids, self.config)
        if self.config.block_size is not None:
            return lay_out_blocks(input_ids, attention_mask, position_ids, self.config.block_size)
        length = input_ids.shape[1]
        real = None if attention_mask is None else attention_mask != 0
        if position_ids is None and real is not None:
            position_ids = row_positions(real)
        elif position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        return Layout(1, length, position_ids, real)

    def attention_context(self, hidden_states, attention_mask, position_ids):
        """The attention mask in the form that the attention implementation takes, and the rotary angles."""
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        context = {"attention_mask": mask, "position_embeddings": self.rotary_angles(hidden_states, position_ids)}
        if self.config.position_group_bias:
            if self.config._attn_implementation not in ("eager", "sdpa"):
                raise ValueError(
                    "attn_implementation must be eager or sdpa with position_group_bias, got "
                    f"{self.config._attn_implementation!r}"
                )
            if position_ids.stride(0) == 0:  # one row, expanded: all rows have the same positions
                position_ids = position_ids[:1]
            groups = self.embeddings.position_groups.T[position_ids]  # (rows, length, groupings)
            context["same_group"] = (groups[:, :, None] == groups[:, None]).to(hidden_states.dtype)
        return context

    def rotary_angles(self, hidden_states, position_ids):
        return None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        layout: Layout | None = None,
        context: CleanContext | None = None,
        clean: bool = False,
        modulation: torch.Tensor | None = None,
        for_head: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: (batch, length) int64, x_t: tokens, some of them the mask token.
            attention_mask: (batch, length), 1 for tokens and 0 for padding, on either side.
            position_ids: (batch, length); default: counted in each row without its padding. With blocks, a position
                that is no larger than the one before it starts a new document, which sees nothing of the others.
            latents: (batch, latent_size), with blocks (batch, blocks, latent_size); default: zeros, the prior mean.
            layout: With it, `input_ids` are on its grid already, and so is what comes back.
            context: With blocks and `layout`, the clean tokens that the blocks see; default: earlier blocks of
                `input_ids` as they stand.
            clean: With blocks and `layout`, `input_ids` are clean tokens to be read: block-causal, under the null
                latent. The output has their keys and values.
            modulation: With `layout`, what `modulation_of` made of the latents, in their place.
            for_head: Whether [`VMDForMaskedDiffusion`] asks, whose part this model may be.

        Returns:
            `last_hidden_state` (batch, length, hidden_size), after the final norm. With blocks, `attentions` are those
            on the grid, of queries and keys [clean, noisy].

        Raises:
            ValueError: for a wrong shape, or more tokens than a position table has; and where somebody else than its
                `VMDForMaskedDiffusion` trains it on clean tokens, as a next-token loss would.
        """
        if self.has_head and self.training and torch.is_grad_enabled() and not for_head and layout is None:
            check_masks(input_ids, self.config)
        if layout is not None:
            return self.run(input_ids, layout, latents, context, clean, modulation, return_dict=True, **kwargs)
        check_keywords(kwargs)
        layout = self.lay_out(input_ids, attention_mask, position_ids)
        grid = layout.scatter(input_ids, 0)
        if self.config.block_size is not None:
            if self.latent_prior is not None and latents is None:
                hidden_states, context = self.read(grid, layout)
                latents, _ = self.latent_prior(last_before_blocks(hidden_states, layout))
            else:
                context = CleanContext(input_ids=grid, position_ids=layout.position_ids, new=layout.places(clean=True))
        outputs = self.run(grid, layout, latents, context, return_dict=True, **kwargs)
        outputs.last_hidden_state = layout.gather(outputs.last_hidden_state)
        outputs.hidden_states = gather_hidden_states(outputs.hidden_states, layout)
        return outputs

    @capture_outputs
    def run(
        self,
        input_ids: torch.LongTensor,
        layout: Layout,
        latents: torch.Tensor | None = None,
        context: CleanContext | None = None,
        clean: bool = False,
        modulation: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """One pass over blocks (or whole sequences) on their grid, and over the clean tokens still to be read.

        `past_key_values` of the output are those of the clean tokens read in this pass: a tuple for each layer.
        """
        if modulation is None and not clean:
            modulation = self.modulation_by(latents, layout, len(input_ids))
        context = context or CleanContext()
        position_ids, num_new = layout.position_ids, 0
        if context.input_ids is not None:
            num_new = context.input_ids.shape[1]
            input_ids = torch.cat([context.input_ids, input_ids], dim=1)
            position_ids = torch.cat([context.position_ids, position_ids], dim=1)
        hidden_states = self.embeddings(input_ids, position_ids)
        if self.config.block_size is None:
            attention = self.attention_context(hidden_states, layout.real, position_ids)
        else:
            query = layout.places(clean)
            query = query if context.new is None else join_places([context.new, query])
            key = query if context.read is None else join_places([context.read, query])
            attention = {
                "attention_mask": block_attention_mask(self.config, query, key, hidden_states.dtype),
                "position_embeddings": self.rotary_angles(hidden_states, position_ids),
            }
        if modulation is not None and self.num_inputs:
            inputs = modulation[:, :, -self.num_inputs :].flatten(1, 2)  # (batch, N * num_inputs, hidden)
            if self.config.block_size is None:
                inputs = inputs.gather(1, layout.position_ids[..., None].expand(*input_ids.shape, inputs.shape[-1]))
            hidden_states = hidden_states + nn.functional.pad(inputs, (0, 0, num_new, 0))
        if modulation is not None:  # what is left of it, of the layers
            modulation = modulation[:, :, : self.num_changes] if self.num_changes else None
        if modulation is not None and num_new:  # clean tokens have the null latent: no modulation at all
            shape = (len(modulation), num_new // layout.width, *modulation.shape[2:])
            null = self.null_modulation(modulation)[: self.num_changes]
            modulation = torch.cat([null.expand(shape), modulation], dim=1)
        hidden_states, keys_values = self.run_layers(
            hidden_states,
            input_ids.shape[1] if clean else num_new,
            context.keys_values,
            modulation,
            **attention,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states[:, num_new:]), past_key_values=keys_values or None
        )

    def read(
        self, input_ids: torch.LongTensor, layout: Layout, context: CleanContext | None = None
    ) -> tuple[torch.Tensor, CleanContext]:
        """Reads clean tokens on the grid in a pass of their own.

        Returns:
            Hidden states (batch, N * width, hidden_size), and what `run` needs to know of these tokens.
        """
        outputs = self(input_ids, layout=layout, context=context, clean=True, return_dict=True)
        read = CleanContext(keys_values=outputs.past_key_values, read=layout.places(clean=True))
        return outputs.last_hidden_state, read

    def run_layers(self, hidden_states, num_new, keys_values, modulation, **kwargs):
        """The layers (`num_loops` times), and each one's keys and values at the first `num_new` tokens."""
        new = []
        modulations = [None] * len(self.layers)
        if modulation is not None:
            modulations = modulation.unflatten(2, (-1, 6)).unbind(2)
        for index in range(self.config.num_loops * len(self.layers)):
            layer = index % len(self.layers)
            context = None if keys_values is None else keys_values[index]
            hidden_states, own = self.layers[layer](
                hidden_states, modulation=modulations[layer], context=context, **kwargs
            )
            if num_new:
                new.append(tuple(part[:, :, :num_new] for part in own))
        return hidden_states, new

    def modulation_by(self, latents: torch.Tensor | None, layout: Layout, batch_size: int) -> torch.Tensor | None:
        """`modulation_of` latents as `forward` takes them (default: zeros); `None` for a model without a latent."""
        check_latents(latents, self.config, layout, batch_size)
        if self.conditioner is None:
            return None
        shape = (batch_size, layout.num_blocks, self.config.latent_size)
        if latents is None:
            latents = torch.zeros(shape, device=layout.position_ids.device)
        return self.modulation_of(latents.view(shape))

    def modulation_of(self, latents: torch.Tensor) -> torch.Tensor:
        """What latents (batch, N, latent_size) do, (batch, N, num_changes + num_inputs, hidden_size): shifts, scales
        and gates of the layers, and what is added to the inputs of a unit's positions. Computed once, it may be given
        to many passes."""
        slices = latents.unflatten(-1, (self.config.num_latent_slices, -1))
        change = self.modulation(self.conditioner(slices)).view(*latents.shape[:-1], -1, self.config.hidden_size)
        return change + self.null_modulation(change)

    def null_modulation(self, like: torch.Tensor) -> torch.Tensor:
        """(num_changes + num_inputs, 1): what leaves everything as it is."""
        return like.new_tensor([0, 1, 1] * (self.num_changes // 3) + [0] * self.num_inputs)[:, None]

    def for_steps(self, modulation: torch.Tensor | None, num_revealed: torch.Tensor) -> torch.Tensor | None:
        """The modulation of units that reveal (batch, N) tokens in a step: that of the null latent where these are
        fewer than `latent_min_tokens`."""
        if modulation is None or self.config.latent_min_tokens == 1:
            return modulation
        few = num_revealed < self.config.latent_min_tokens
        few = few.view(*few.shape, *[1] * (modulation.dim() - few.dim()))
        return torch.where(few, self.null_modulation(modulation), modulation)


class PassThrough(nn.Module):
    """In an encoder's place: what comes in is what it would have put out."""

    def forward(self, *args, inputs_embeds=None, **kwargs):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class VMDBackbone(VMDModel):
    """The denoiser made of another masked language model of transformers. What z has to say is added to the token
    embeddings; it is nothing as long as the weights that say it are zero."""

    def __init__(self, config: VMDConfig):
        VMDPreTrainedModel.__init__(self, config)
        self.masked_lm = AutoModelForMaskedLM.from_config(config.backbone_config)
        self.conditioner = VMDConditioner(config) if config.latent_size else None
        size = config.conditioning_size, config.hidden_size
        self.modulation = VMDZeroLinear(*size) if config.latent_size else None
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
            layout.slots = layout.position_ids.masked_fill(~layout.real, layout.width)
            layout.position_ids = torch.arange(layout.width, device=input_ids.device).expand_as(input_ids)
            layout.real = layout.scatter(layout.real, False)
        return layout

    def run(
        self, input_ids, layout, latents=None, context=None, clean=False, modulation=None, **kwargs
    ) -> BaseModelOutputWithPast:
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if modulation is None:
            modulation = self.modulation_by(latents, layout, len(input_ids))
        if modulation is not None:
            inputs_embeds = inputs_embeds + modulation
        real = None if layout.real is None else layout.real.long()
        outputs = self.masked_lm.base_model(inputs_embeds=inputs_embeds, attention_mask=real, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def modulation_of(self, latents: torch.Tensor) -> torch.Tensor:
        """What latents (batch, 1, latent_size) add to every token's embedding, (batch, 1, hidden_size)."""
        return self.modulation(self.conditioner(latents))

    def null_modulation(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(())

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) to (..., vocab_size): the whole masked language model but for its encoder."""
        head = copy.copy(self.masked_lm)
        head._modules = {**self.masked_lm._modules, self.masked_lm.base_model_prefix: PassThrough()}
        logits = head(inputs_embeds=hidden_states.flatten(0, -2)[None], return_dict=True).logits
        return logits.view(*hidden_states.shape[:-1], -1)


class VMDLatentEncoder(nn.Module):
    """The posterior q_phi(z | x_0, x_t): a diagonal Gaussian, from x_0 and what is masked in x_t.

    Its layers read the clean tokens with a flag each (visible, revealed now, still masked) and are pooled over the
    tokens that are revealed now: their mean, or each one beside the others, or each one for its own slice of z (the
    slices of all other positions tell nothing: they have the prior). With blocks, each block is a sequence of
    its own, to whose tokens the hidden state of the last clean token before it is added: z has to tell only what the
    context does not. Needed in training and for likelihoods only.
    """

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.embed_flags = nn.Embedding(3, config.hidden_size)
        self.layers = nn.ModuleList(
            VMDLayer(config, config.num_hidden_layers + index) for index in range(config.num_latent_encoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        concat = config.latent_encoder_pooling == "concat"
        self.num_places = config.positions_per_latent if concat or config.latent_per_position else None
        self.num_slices = config.num_latent_slices
        size = config.hidden_size * (self.num_places or 1) // self.num_slices
        self.out_proj = VMDPosteriorLinear(size, 2 * config.latent_size // self.num_slices)
        with_blocks = config.block_size is not None
        self.before_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if with_blocks else None

    def forward(self, clean_embeddings, masked, revealed, position_ids, attention_context, before=None, prior=()):
        """
        Args:
            clean_embeddings: (batch, length, hidden), embeddings of x_0. With blocks, a row here is a block.
            masked, revealed: (batch, length) bool, as in `Corruption`.
            position_ids: (batch, length): a token's own place where each has one (modulo the block's size).
            before: With blocks, (batch, hidden): the last clean hidden state before the block, 0 if there is none.
            prior: Mean and log-variance of a learned prior, each (batch, latent_size); none: N(0, I).

        Returns:
            mean and log-variance, each (batch, latent_size) float32; those of the prior where nothing is revealed.
        """
        flags = torch.where(revealed, REVEALED_NOW, torch.where(masked, STILL_MASKED, VISIBLE))
        hidden_states = clean_embeddings + self.embed_flags(flags)
        if before is not None:
            hidden_states = hidden_states + self.before_proj(before)[:, None]
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, **attention_context)
        hidden_states = self.norm(hidden_states) * revealed[..., None]
        told = revealed.any(-1, keepdim=True)  # (batch, slices): which slices have anything to tell
        if self.num_places is None:
            pooled = hidden_states.sum(1) / revealed.sum(-1, keepdim=True).clamp(min=1)
        else:
            places = position_ids % self.num_places
            pooled = hidden_states.new_zeros(len(revealed), self.num_places, hidden_states.shape[-1])
            pooled = pooled.scatter_add(1, places[..., None].expand_as(hidden_states), hidden_states)
            if self.num_slices > 1:
                told = places.new_zeros(pooled.shape[:2]).scatter_add(1, places, revealed.long()) > 0
        parts = self.out_proj(pooled.view(len(pooled), self.num_slices, -1)).float().chunk(2, dim=-1)
        priors = [part.unflatten(-1, (self.num_slices, -1)) for part in prior] or (0.0, 0.0)
        return tuple(torch.where(told[..., None], *pair).flatten(1) for pair in zip(parts, priors, strict=True))


class VMDForMaskedDiffusion(VMDGenerationMixin, VMDPreTrainedModel):
    """Masked diffusion language model with a latent: denoiser, posterior, loss in `forward`, and `generate`.

    With `labels` the forward pass draws noise and returns the loss, so that the plain `Trainer` trains the model:

    - `objective="vmd"` (the paper's L_VMD): every token is masked with probability t, and the row pays
      `(R + kl_weight * KL) / t`, with the posterior q(z | x_0, x_t). The sampler that belongs to it draws a fresh z
      for each step; the paper keeps one.
    - `objective="per_sample"`: the likelihood bound of the few-step sampler that keeps one z: a random step k of T_n
      with the tokens A_k that it reveals, `T_n * R(A_k) + kl_weight * KL(q(z | x_0, all masked) || p)`.
    - `objective="per_step"`: the bound of the sampler with a fresh z per step:
      `T_n * (R(A_k) + kl_weight * KL(q(z | x_0, x^(k), A_k) || p))`.

    Where z is not told of A_k (or there is none), R(A_k) is its expectation over A_k, a share of all masked tokens' R.

    Everything is summed over the batch and divided by the number of labelled tokens, or by `num_items_in_batch`, as
    the Trainer passes it. With `latent_size > 0`, `exp(loss)` of the `vmd` objective is not a perplexity.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}  # noqa: RUF012
    generation_config_class = VMDGenerationConfig

    def __init__(self, config: VMDConfig):
        super().__init__(config)
        self.model = VMDModel(config) if config.backbone_config is None else VMDBackbone(config)
        self.lm_head = None
        if config.backbone_config is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self._tied_weights_keys = None  # the backbone's own are
        self.model.has_head = True
        self.latent_encoder = VMDLatentEncoder(config) if config.latent_size else None
        # Training-mode forward passes so far: saved with the weights, so that a resumed run goes on warming up.
        self.register_buffer("kl_warmup_progress", torch.zeros((), dtype=torch.long))
        self.post_init()

    @classmethod
    def from_masked_lm(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        latent_size: int = 64,
        mask_token_id: int | None = None,
        **kwargs,
    ) -> "VMDForMaskedDiffusion":
        """A VMD around a masked language model that somebody else trained (BERT, RoBERTa, ModernBERT, ...).

        Its weights are not changed, and at the start the logits are the model's own, whatever z is (but for the mask
        and pad tokens, which have probability 0). Train it wholly, by LoRA, or with `model.model.masked_lm` frozen.
        Whole sequences only.

        Args:
            model: The masked language model, which becomes part of this one, or its folder or Hub id.
            latent_size: Dimensions of z.
            mask_token_id: Default: that of the tokenizer beside the model, which must be given by its name then.
            kwargs: Further fields of [`VMDConfig`].

        Raises:
            ValueError: for a model without an encoder and an output embedding, or without a known mask token.
        """
        if not isinstance(model, PreTrainedModel):
            if mask_token_id is None:
                mask_token_id = AutoTokenizer.from_pretrained(model).mask_token_id
            model = AutoModelForMaskedLM.from_pretrained(model)
        if mask_token_id is None:
            raise ValueError("mask_token_id must be given with a model object, got None")
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
        settings = {
            "vocab_size": backbone.vocab_size,
            "hidden_size": backbone.hidden_size,
            "num_hidden_layers": backbone.num_hidden_layers,
            "num_attention_heads": backbone.num_attention_heads,
            "max_position_embeddings": min(longest),
            "pad_token_id": backbone.pad_token_id,
        }
        config = VMDConfig(
            backbone_config=backbone, latent_size=latent_size, mask_token_id=mask_token_id, **(settings | kwargs)
        )
        vmd = cls(config).to(device=model.device, dtype=model.dtype).train(model.training)
        vmd.model.masked_lm = model
        return vmd

    def get_output_embeddings(self):
        return self.model.masked_lm.get_output_embeddings() if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, new_embeddings):
        if self.lm_head is None:
            self.model.masked_lm.set_output_embeddings(new_embeddings)
        else:
            self.lm_head = new_embeddings

    def loss_function(self, *args, **kwargs):
        """Where transformers has a loss for others to call, next-token prediction by default."""
        raise ValueError(f"loss_function must not be called: {OWN_LOSS}")

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) to (..., vocab_size), -inf at the tokens that may never appear."""
        logits = self.model.head(hidden_states) if self.lm_head is None else self.lm_head(hidden_states)
        for token_id in self.config.forbidden_token_ids:  # two at most
            logits[..., token_id] = -torch.inf
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        times: torch.Tensor | None = None,
        position_noise: torch.Tensor | None = None,
        latent_noise: torch.Tensor | None = None,
        noise_seeds: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> VMDMaskedDiffusionOutput:
        """Without labels: logits of p_theta(x_0 | x_t, z). With labels: the loss, under noise drawn here.

        Args:
            input_ids: (batch, length) int64. Without labels x_t; with labels the clean x_0.
            attention_mask: (batch, length), 1 for tokens and 0 for padding, on either side.
            position_ids: (batch, length); default: counted in each row without its padding.
            latents: (batch, latent_size), with blocks (batch, blocks, latent_size), float, without labels only;
                default: zeros, the prior mean.
            labels: (batch, length) int64, equal to `input_ids`, or -100 for context that is never masked.
            times: (batch,), with blocks (batch, blocks), float. Under `vmd` the time t in (0, 1]; under the few-step
                objectives a number in [0, 1) that picks the number of steps and the step. Default: drawn stratified
                over the batch in training mode, a hash of the row in evaluation mode; so are the two next.
            position_noise: (batch, length) float. A token is masked where it is below t; under the few-step
                objectives it ranks the order of revealing (the loss depends on the masks alone where no latent is told
                what is revealed). To give a mask itself: 0 where masked, 1 elsewhere.
            latent_noise: (batch, latent_size), with blocks (batch, blocks, latent_size), float, standard normal:
                z = mean + std * latent_noise. With several `objective_draws` they are the dimension before the last.
            noise_seeds: (batch,) int64. What is not given of the three is a function of the row's seed and of nothing
                else; consecutive seeds have stratified times. (See `vmd_hf.training.SeededNoiseCallback`.)
            num_items_in_batch: Labelled tokens over which the loss is averaged; default: those of this batch.

        Raises:
            ValueError: for wrong shapes, labels that differ from the inputs or have no probability, or labels that
                the Trainer held back.
        """
        if labels is None:
            if num_items_in_batch is not None:
                raise ValueError(
                    "labels must reach the model, whose loss is computed in forward; the Trainer keeps them with "
                    "label_smoothing_factor > 0 or compute_loss_func, and neither can be used"
                )
            outputs = self.model(input_ids, attention_mask, position_ids, latents, for_head=True, **kwargs)
            return VMDMaskedDiffusionOutput(
                logits=self.compute_logits(outputs.last_hidden_state),
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        if latents is not None:
            raise ValueError("latents must be None when labels are given: the posterior draws them (see latent_noise)")

        check_keywords(kwargs)
        layout = self.model.lay_out(input_ids, attention_mask, position_ids)
        check_labels(input_ids, labels, attention_mask, self.config)
        clean = layout.scatter(input_ids, 0)
        units = layout.units(clean)  # a unit is what has a time and a latent: (batch * N, width)
        maskable = layout.units(layout.scatter(labels != -100, False))
        if position_noise is not None:
            check_shape("position_noise", position_noise, input_ids.shape)
            position_noise = layout.scatter(position_noise, 0.0)
        noise = check_noise(
            self._draw_noise(units, layout, noise_seeds), (times, position_noise, latent_noise), layout, self.config
        )
        corruption = self._corrupt(maskable, *noise)

        context, before = None, None
        if self.config.block_size is not None:
            clean_hidden_states, context = self.model.read(clean, layout)
            before = last_before_blocks(clean_hidden_states, layout).flatten(0, 1)  # (units, hidden)
        posterior_shift, kl_elements, is_told = None, None, maskable.new_zeros(len(maskable))
        num_revealed = corruption.revealed.sum(-1)  # (units,)
        per_latent = (len(clean),) if self.config.block_size is None else (len(clean), layout.num_blocks)
        if self.latent_encoder is not None:
            prior = () if self.model.latent_prior is None else self.model.latent_prior(before)
            q_mean, q_log_variance = self.encode(clean, layout, maskable, corruption, before, prior)
            has_latent = num_revealed[:, None] >= self.config.latent_min_tokens  # (units, 1)
            if self.config.objective == "per_step":  # under vmd A_k is M_t, under per_sample z is not told of it
                is_told = has_latent.squeeze(-1)
            kl_elements = gaussian_kl(q_mean, q_log_variance, *prior) * has_latent  # (units, latent_size)
            posterior_shift = (standardised(q_mean, *prior) * has_latent).detach().view(*per_latent, -1)
            mean, log_variance, *prior = (part[:, None] for part in (q_mean, q_log_variance, *prior))
            latents, log_ratio = draw_latents(mean, log_variance, noise[2], *prior)  # (units, draws, latent_size)
            latents = latents.unflatten(0, (len(clean), -1)).transpose(1, 2).flatten(0, 1)  # (rows * draws, N, size)
            latents = latents.view(-1, *per_latent[1:], self.config.latent_size)

        x_t = units.masked_fill(corruption.masked, self.config.mask_token_id).view_as(clean)
        num_draws = self.config.objective_draws if self.config.latent_size else 1
        targets, draws_layout, num_revealed = clean, layout, num_revealed.view(len(clean), -1)
        scored, share = scored_tokens(corruption.masked, corruption.revealed, is_told)
        scored = scored.view_as(clean)
        if num_draws > 1:
            rows = torch.arange(len(clean), device=clean.device).repeat_interleave(num_draws)
            x_t, targets, scored, num_revealed = x_t[rows], clean[rows], scored[rows], num_revealed[rows]
            draws_layout = layout.select(rows)
            context = None if context is None else context.select(rows)
        loop_loss = self.config.loop_loss and self.training
        if loop_loss:
            kwargs["output_hidden_states"] = True
        modulation = self.model.modulation_by(latents, draws_layout, len(x_t))
        modulation = self.model.for_steps(modulation, num_revealed)
        outputs = self.model(
            x_t, modulation=modulation, layout=draws_layout, context=context, return_dict=True, **kwargs
        )
        num_items = maskable.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        num_items = num_items.clamp(min=1)
        weight = corruption.weight * share / num_items
        places = scored.nonzero(as_tuple=True)
        unit = places[0] * layout.num_blocks + places[1] // layout.width

        def reconstruct(hidden_states):  # (units, draws)
            logits = self.compute_logits(hidden_states[places])
            losses = row_cross_entropy(logits, targets[places], unit, num_draws * len(units))
            return losses.view(len(clean), num_draws, -1).transpose(1, 2).flatten(0, 1)

        reconstruction = reconstruct(outputs.last_hidden_state)
        reconstruction_loss = (weight * reconstruction.mean(-1)).sum()
        kl, kl_loss = self._kl_terms(kl_elements, corruption, num_items)
        if num_draws == 1:
            loss = reconstruction_loss + self._kl_weight() * kl_loss
        else:
            log_ratio = log_ratio.sum(-1) * has_latent
            evidence = self._kl_weight() * log_ratio - reconstruction  # (units, draws)
            loss = (weight * (math.log(num_draws) - evidence.logsumexp(-1))).sum()
        if loop_loss:
            num_layers = self.config.num_hidden_layers
            earlier = outputs.hidden_states[num_layers:-1:num_layers]  # of [clean tokens, grid], before the norm
            norm = self.model.norm
            reconstructions = [reconstruct(norm(state[:, -clean.shape[1] :])).mean(-1) for state in earlier]
            loss = loss + (weight * sum(reconstructions)).sum() / len(earlier)
        return VMDMaskedDiffusionOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss.detach(),
            kl=kl.detach(),
            kl_per_latent=None if kl_elements is None else kl_elements.sum(-1).detach().view(per_latent),
            posterior_shift=posterior_shift,
            hidden_states=gather_hidden_states(outputs.hidden_states, draws_layout),
            attentions=outputs.attentions,
        )

    def encode(
        self,
        input_ids: torch.LongTensor,
        layout: Layout,
        maskable: torch.Tensor,
        corruption: Corruption,
        before: torch.Tensor | None = None,
        prior: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior of the config's objective, each (batch * N, latent_size) float32.

        `input_ids` (batch, N * width) are clean and on the grid; `maskable` and `corruption` are those of its units,
        and so are `before` and `prior`.
        """
        masked, revealed = corruption.masked, corruption.revealed
        if self.config.objective == "per_sample":  # one z for all steps: q(z | x_0, all masked)
            masked, revealed = maskable, maskable
        embeddings = layout.units(self.model.embeddings(input_ids, layout.position_ids))
        real = None
        if layout.real is not None:
            real = layout.units(layout.real)
            real = real | ~real.any(-1, keepdim=True)  # a block of padding alone may attend to itself
        position_ids = layout.units(layout.position_ids)
        context = self.model.attention_context(embeddings, real, position_ids)
        return self.latent_encoder(embeddings, masked, revealed, position_ids, context, before, prior)

    def _draw_noise(self, units, layout, seeds):
        per_unit = self.config.objective_draws, self.config.latent_size
        if self.training and seeds is None:
            device = units.device
            return (
                stratified_uniform(len(units), device),
                torch.rand(units.shape, device=device),
                torch.randn(len(units), *per_unit, device=device),
            )
        position_ids, size = layout.units(layout.position_ids), math.prod(per_unit)
        if seeds is None:
            real = None if layout.real is None else layout.units(layout.real)
            times, position_noise, latent_noise = hashed_noise(units, real, position_ids, size)
        else:
            check_shape("noise_seeds", seeds, (len(units) // layout.num_blocks,))
            times, position_noise, latent_noise = seeded_noise(seeds, layout.num_blocks, position_ids, size)
        return times, position_noise, latent_noise.view(len(units), *per_unit)

    def _corrupt(self, maskable, times, position_noise, latent_noise) -> Corruption:
        if self.config.objective == "vmd":
            return corrupt_at_time(maskable, times, position_noise)
        return corrupt_before_step(maskable, times, position_noise, self.config.objective_steps)

    def _kl_terms(self, kl_elements, corruption, num_items):
        """The KL term as it is, and in training with free bits."""
        if kl_elements is None:
            return corruption.weight.new_zeros(2)
        weight = torch.ones_like(corruption.weight) if self.config.objective == "per_sample" else corruption.weight
        weight = weight / num_items
        kl = (weight * kl_elements.sum(-1)).sum()
        if not (self.training and self.config.free_bits):
            return kl, kl
        free = self.config.free_bits * (kl_elements > 0)  # where nothing is told, nothing is free
        return kl, (weight * kl_elements.maximum(free).sum(-1)).sum()

    def _kl_weight(self) -> float | torch.Tensor:
        """Weight of the KL term; in training it warms up, and a call counts as a step of it."""
        beta = self.config.kl_weight
        if self.training and self.config.kl_warmup_steps and self.config.latent_size:
            self.kl_warmup_progress += 1
            # Cubic: the latent is learned while it is almost free. Under a linear one part of it is given up early.
            beta = beta * (self.kl_warmup_progress / self.config.kl_warmup_steps).clamp(max=1) ** 3
        return beta


@contextmanager
def saved_with_code(model: VMDPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
    """Within it, saving the model saves its code, too, and names it in the config, and the tokenizer, if given. (Not
    always: or every checkpoint of a training run would copy the code.)"""
    classes = ((VMDConfig, "AutoConfig"), (VMDModel, "AutoModel"), (VMDForMaskedDiffusion, "AutoModelForMaskedLM"))
    before = [cls._auto_class for cls, _ in classes]
    config, names = model.config, ("auto_map", "custom_pipelines")
    attributes = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        model._tokenizer_to_save = tokenizer
        for cls, auto_class in classes:
            cls.register_for_auto_class(auto_class)
        config.auto_map = {"AutoModel": f"{VMDModel.__module__.rpartition('.')[2]}.{VMDModel.__name__}"}
        pipeline = {"impl": "pipeline_vmd.MaskedDiffusionPipeline", "pt": ["AutoModelForMaskedLM"]}
        config.custom_pipelines = {"masked-diffusion": pipeline}
        yield
    finally:
        model._tokenizer_to_save = None
        for (cls, _), auto_class in zip(classes, before, strict=True):
            cls._auto_class = auto_class
        for name in names:
            config.__dict__.pop(name, None)
        config.__dict__.update(attributes)


def gather_hidden_states(hidden_states, layout: Layout):
    """Each of `hidden_states` (or `None`, where not selected), [clean tokens, grid], for the rows' own columns."""
    if hidden_states is None:
        return None
    length = layout.num_blocks * layout.width
    return tuple(None if state is None else layout.gather(state[:, -length:]) for state in hidden_states)


def last_before_blocks(hidden_states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """For each block the clean hidden state of the token before it, 0 where it is the first of its document.

    (batch, N * width, hidden) to (batch, N, hidden).
    """
    last = hidden_states.unflatten(1, (layout.num_blocks, layout.width))[:, :, -1]  # (batch, N, hidden)
    document = layout.document.unflatten(1, (layout.num_blocks, layout.width))
    follows = (document[:, 1:, 0] == document[:, :-1, -1]) & (document[:, 1:, 0] >= 0)
    return nn.functional.pad(last[:, :-1] * follows[..., None], (0, 0, 1, 0))


def check_keywords(keywords):
    """Everything that transformers passes to any model is fine; a name that nobody knows is a slip of the pen."""
    unknown = sorted(name for name, value in keywords.items() if name not in _KEYWORDS and value is not None)
    if unknown:
        raise ValueError(f"forward knows no argument {', '.join(map(repr, unknown))}")


def check_shape(name, value, expected):
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")


def check_inputs(input_ids, attention_mask, position_ids, config):
    """Shapes are right, and no row is longer than a position table."""
    if input_ids is None or input_ids.dim() != 2:
        got = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must have shape (batch, length), got {got}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids must have at least one row and one column, got shape {tuple(input_ids.shape)}")
    for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(value.shape)}"
            )
    has_table = config.position_embedding_type == "learned" or config.position_groups
    if config.block_size is None:  # else the places are those of a block
        has_table = has_table or config.latent_position_inputs or config.latent_per_position
    if not has_table and config.backbone_config is None:
        return
    if position_ids is not None:
        longest = int(position_ids.max()) + 1
    elif input_ids.shape[1] <= config.max_position_embeddings:
        return
    else:
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.ne(0).sum(-1).max())
    if longest > config.max_position_embeddings:
        raise ValueError(
            "input_ids must have at most max_position_embeddings = "
            f"{config.max_position_embeddings} tokens with a position table, got {longest}"
        )


def check_latents(latents, config, layout, batch_size):
    """Given latents have the right shape."""
    if latents is None:
        return
    if config.latent_size == 0:
        raise ValueError("latents must be None for a model with latent_size = 0")
    if config.block_size is None:
        names, shape = "(batch, latent_size)", (batch_size, config.latent_size)
    else:
        names, shape = "(batch, blocks, latent_size)", (batch_size, layout.num_blocks, config.latent_size)
    if latents.shape != shape:
        raise ValueError(f"latents must have shape {names} = {shape}, got {tuple(latents.shape)}")


@torch.compiler.disable
def check_masks(input_ids, config):
    """There is something to denoise. (It waits for the device, but not where a model is trained as it should be.)"""
    if config.mask_token_id is not None and not (input_ids == config.mask_token_id).any():
        raise ValueError(f"input_ids must hold mask tokens when model.model alone is trained, got none: {OWN_LOSS}")


@torch.compiler.disable
def check_labels(input_ids, labels, attention_mask, config):
    if config.mask_token_id is None:
        raise ValueError("mask_token_id must be set in the config to compute a loss, got None")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
        )
    labelled = labels != -100
    padding = torch.zeros_like(labelled) if attention_mask is None else attention_mask == 0
    impossible = torch.zeros_like(labelled)
    for token_id in config.forbidden_token_ids:
        impossible |= labels == token_id
    problems = torch.stack([labelled & padding, impossible, labelled & (labels != input_ids)]).flatten(1).any(-1)
    on_padding, impossible, unequal = problems.tolist()  # one transfer from the device for all three
    if on_padding:
        raise ValueError("labels must be -100 where attention_mask is 0, got a label on padding")
    if impossible:
        raise ValueError(
            "labels must not hold the mask token or the pad token (use -100 for padding), whose probability is 0: "
            f"ids {config.forbidden_token_ids}"
        )
    if unequal:
        raise ValueError(
            "labels must equal input_ids where they are not -100, since the model draws the noise itself; a collator "
            "that masks tokens is the usual cause: use DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )


def check_noise(drawn, given, layout, config):
    """The given noise where there is any, of the right shape, else the drawn, for units. Times become those of the
    objective; `position_noise` is on the grid already."""
    times, position_noise, latent_noise = given
    units = (len(drawn[0]),) if config.block_size is None else (len(drawn[0]) // layout.num_blocks, layout.num_blocks)
    if times is not None:
        check_shape("times", times, units)
        low, high = times.min().item(), times.max().item()
        if config.objective == "vmd" and not (0 < low and high <= 1):
            raise ValueError(f"times must lie in (0, 1] under the vmd objective, got {low} to {high}")
        if config.objective != "vmd" and not (0 <= low and high < 1):
            raise ValueError(f"times must lie in [0, 1) under {config.objective}, got {low} to {high}")
        times = times.flatten()
    elif config.objective == "vmd":
        times = config.time_epsilon + (1 - config.time_epsilon) * drawn[0]
    else:
        times = drawn[0]
    if latent_noise is not None:
        draws = () if config.objective_draws == 1 else (config.objective_draws,)
        check_shape("latent_noise", latent_noise, (*units, *draws, config.latent_size))
    return (
        times,
        drawn[1] if position_noise is None else layout.units(position_noise),
        drawn[2] if latent_noise is None else latent_noise.view_as(drawn[2]),
    )


__all__ = ["VMDForMaskedDiffusion", "VMDMaskedDiffusionOutput", "VMDModel", "VMDPreTrainedModel"]
