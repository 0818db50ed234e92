"""Variational Masked Diffusion models (arXiv 2510.23606): the denoiser, and the model with its loss and `generate`."""

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .backbones_vmd import VMDBackbone, add_mask_token, backbone_settings, load_language_model
from .blocks_vmd import AttentionChunks, CleanContext, Layout, block_attention_mask, join_token_indices
from .causal_vmd import VMDCausalHead
from .chain_vmd import VMDChain
from .checks_vmd import OWN_LOSS, check_shape
from .configuration_vmd import VMDConfig
from .denoiser_vmd import VMDDenoiser, VMDModelOutput, gather_hidden_states
from .generation_vmd import VMDGenerationConfig, VMDGenerationMixin, execution_device
from .latents_vmd import VMDConditioner, VMDLatentEncoder, VMDLatentPrior, VMDPositionInputs
from .layers_vmd import VMDLayer
from .objective_vmd import chain_loss, corrupt, next_token_loss, read_clean, variational_loss
from .saving_vmd import VMDPreTrainedModel


@dataclass
class VMDMaskedDiffusionOutput(ModelOutput):
    """Output of [`VMDForMaskedDiffusion`].

    Attributes:
        loss: Scalar, `reconstruction_loss + kl_weight * kl`, nats a labelled token. With labels only. (In training
            mode the KL term also carries its warm-up.)
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


class VMDEmbeddings(nn.Module):
    """Token embeddings plus whatever position tables the config asks for."""

    def __init__(self, config: VMDConfig):
        super().__init__()
        self.config = config
        never_real = config.pad_token_id in config.forbidden_token_ids  # a pad token that ends texts must learn
        padding_idx = config.pad_token_id if never_real else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=padding_idx)
        learned = config.position_embedding_type in ("learned", "both")
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


class VMDModel(VMDDenoiser):
    """The denoiser p_theta(x_0 | x_t, z) up to its hidden states: a transformer conditioned on z, bidirectional or,
    with `block_size`, bidirectional within a block and causal over blocks."""

    _keys_to_ignore_on_load_unexpected = (r"latent_encoder\.", r"lm_head\.", r"kl_warmup_progress")

    def __init__(self, config: VMDConfig):
        if config.backbone_config is not None:
            raise ValueError("a model with a backbone_config is a VMDForMaskedDiffusion (AutoModelForMaskedLM)")
        super().__init__(config)
        self.embeddings = VMDEmbeddings(config)
        conditioned = config.gaussian_size > 0 and config.latent_input != "position_slices"
        self.layers = nn.ModuleList(VMDLayer(config, index, conditioned) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.conditioner = VMDConditioner(config) if config.gaussian_size else None
        self.position_inputs = VMDPositionInputs(config) if config.latent_input != "layers" else None
        self.latent_prior = VMDLatentPrior(config) if config.prior == "learned" else None
        rotary = config.position_embedding_type in ("rotary", "both")
        self.rotary_emb = LlamaRotaryEmbedding(config) if rotary else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.embed_tokens

    def set_input_embeddings(self, value):
        self.embeddings.embed_tokens = value

    def attention_context(self, hidden_states, attention_mask, position_ids, document=None) -> dict:
        context = super().attention_context(hidden_states, attention_mask, position_ids, document)
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

    def grid_attention(self, hidden_states, layout: Layout, position_ids, context: CleanContext, clean: bool) -> dict:
        """Arguments of a layer's attention for `run`."""
        if self.config.block_size is None:
            return self.attention_context(hidden_states, layout.real, position_ids, layout.document)
        angles = self.rotary_angles(hidden_states, position_ids)
        if context.sees_all and context.new is None and self.config._attn_implementation != "flex_attention":
            return {"attention_mask": None, "position_embeddings": angles}
        query = layout.token_index(clean)
        query = query if context.new is None else join_token_indices([context.new, query])
        key = query if context.read is None else join_token_indices([context.read, query])
        mask = AttentionChunks.plan(self.config, layout, clean, query, key, hidden_states.dtype)
        if mask is None:
            mask = block_attention_mask(self.config, query, key, hidden_states.dtype)
        return {"attention_mask": mask, "position_embeddings": angles}

    @capture_outputs
    def run(
        self,
        input_ids: torch.LongTensor,
        layout: Layout,
        conditioning: torch.Tensor | None = None,
        context: CleanContext | None = None,
        clean: bool = False,
        **kwargs,
    ) -> VMDModelOutput:
        context = context or CleanContext()
        position_ids, num_new = layout.position_ids, 0
        if context.input_ids is not None:
            num_new = context.input_ids.shape[1]
            input_ids = torch.cat([context.input_ids, input_ids], dim=1)
            position_ids = torch.cat([context.position_ids, position_ids], dim=1)
        hidden_states = self.embeddings(input_ids, position_ids)
        if context.attention is None:
            context.attention = self.grid_attention(hidden_states, layout, position_ids, context, clean)
        if conditioning is not None and self.position_inputs is not None:
            inputs = self.position_inputs(conditioning, None if self.config.block_size else layout.position_ids)
            hidden_states = hidden_states + nn.functional.pad(inputs, (0, 0, num_new, 0))
        if self.config.latent_input == "position_slices":
            conditioning = None  # the layers have nothing that reads it
        elif conditioning is not None and num_new:  # clean tokens have the null latent
            conditioning = nn.functional.pad(conditioning, (0, 0, num_new // layout.width, 0))
        keys_values, num_clean = [], input_ids.shape[1] if clean else num_new
        attention = context.attention | kwargs
        for index, layer in enumerate([*self.layers] * self.config.num_loops):
            read = () if context.keys_values is None else context.keys_values[index]
            if context.room is not None:
                attention["room"] = context.room[index]
            hidden_states, key, value = layer(hidden_states, conditioning, *read, **attention)
            if num_clean:
                keys_values.append((key[:, :, :num_clean], value[:, :, :num_clean]))
        return VMDModelOutput(
            last_hidden_state=self.norm(hidden_states[:, num_new:] if num_new else hidden_states),
            keys_values=tuple(keys_values) or None,
        )


class VMDForMaskedDiffusion(VMDGenerationMixin, VMDPreTrainedModel):
    """Masked diffusion language model with a latent: denoiser, posterior, loss in `forward`, and `generate`.

    With `labels` the forward pass draws noise and returns the loss of the config's `objective` (`objective_vmd.py` has
    the formulas), so that the plain `Trainer` trains the model. It is summed over the batch and divided by the number
    of labelled tokens, or by `num_items_in_batch`, as the Trainer passes it. With `latent_size > 0`, `exp(loss)` of
    the `vmd` objective is not a perplexity.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = (r"^kl_warmup_progress$",)
    generation_config_class = VMDGenerationConfig

    def __init__(self, config: VMDConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        own = config.backbone_config is None
        self.model = VMDModel(config) if own else VMDBackbone(config, language_model)
        self.lm_head = None
        if own:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self._tied_weights_keys = None  # the backbone's own are
        self.model.has_head = True
        self.latent_encoder = VMDLatentEncoder(config) if config.gaussian_size else None
        self.chain = VMDChain(config) if config.num_states else None
        self.causal_head = VMDCausalHead(config) if config.causal_head_size else None
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

        Args:
            model: The masked language model, which becomes part of this one, or its folder or Hub id.
            latent_size: Dimensions of z, or states of the chain.
            mask_token_id: Default: that of the tokenizer beside the model, which must be given by its name then.
            kwargs: Further fields of [`VMDConfig`]: `latent_type="chain"`, `block_size` ... With blocks the model must
                be one of transformers with attention in all its layers, a cache, and no window that is shorter than
                the sequences (BERT, RoBERTa, EuroBERT ...; not ModernBERT).

        Raises:
            ValueError: for a model without an encoder and an output embedding, without a known mask token, or with a
                tokenizer that is not its own; for one that cannot be read in blocks.
        """
        if not isinstance(model, PreTrainedModel):
            model, mask_token_id, _ = load_language_model(model, "masked_lm", mask_token_id)
        if mask_token_id is None:
            raise ValueError("mask_token_id must be given with a model object, got None")
        return cls._around(model, "masked_lm", latent_size=latent_size, mask_token_id=mask_token_id, **kwargs)

    @classmethod
    def from_causal_lm(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        block_size: int,
        token_shift: bool = True,
        latent_type: Literal["gaussian", "chain"] = "chain",
        latent_size: int = 64,
        mask_token_id: int | None = None,
        **kwargs,
    ) -> "VMDForMaskedDiffusion":
        """A block diffusion model around a causal language model that somebody else trained (Llama, Qwen, GPT-2 ...).

        Clean tokens are read as the causal model reads them; the tokens of a block under denoising see one another and
        the clean blocks before. With `block_size=1` and the shift it is the causal model: the same logits, likelihood
        and greedy continuation (but for the mask token, and a pad token, whose probability is 0). See
        `backbones_vmd.py` for what a model needs, and for what is done with the first token of a document.

        Train it wholly, by LoRA, or with `model.model` frozen, the chain alone; in blocks that grow, by
        `from_pretrained(folder, block_size=8)` after a training with fewer.

        Args:
            model: The causal language model, which becomes part of this one, or its folder or Hub id.
            block_size: Tokens of a block.
            token_shift: Whether the hidden state before a token predicts it, as in the causal model, or that at its
                own place, which has to be learned.
            latent_type, latent_size: Of [`VMDConfig`]; `latent_size=0` for no latent.
            mask_token_id: A token that the model has and texts do not. Default: the mask token of the tokenizer beside
                a model that is given by its name, or a new one, whose embedding is the mean of all others. If the
                tokenizer gets it, too, `save_pretrained` saves it with the model.
            kwargs: Further fields of [`VMDConfig`]: `causal_loss_weight`, `objective` ...

        Raises:
            ValueError: for a model that is no causal language model with a head, has other layers than attention, or
                whose tokenizer is not its own. Rows beyond a sliding window are errors later.
        """
        if block_size is None:
            raise ValueError("block_size must be at least 1 with a causal language model, got None")
        tokenizer = None
        if not isinstance(model, PreTrainedModel):
            model, mask_token_id, tokenizer = load_language_model(model, "causal_lm", mask_token_id)
        fields = {"block_size": block_size, "token_shift": token_shift, "latent_type": latent_type}
        backbone_settings(model, "causal_lm", with_blocks=True)  # what is wrong with it is said before it is changed
        if mask_token_id is None:
            mask_token_id = model.get_input_embeddings().num_embeddings
            add_mask_token(model, mask_token_id)
        fields |= {"latent_size": latent_size, "mask_token_id": mask_token_id}
        vmd = cls._around(model, "causal_lm", **fields, **kwargs)
        vmd._tokenizer_to_save = tokenizer
        return vmd

    @classmethod
    def _around(cls, model: PreTrainedModel, backbone_type: str, **fields) -> "VMDForMaskedDiffusion":
        settings = backbone_settings(model, backbone_type, fields.get("block_size") is not None)
        vmd = cls(VMDConfig(**settings | fields), model)
        if fields.get("attn_implementation") is not None:
            model.set_attn_implementation(fields["attn_implementation"])
        device = execution_device(model, torch.empty(0))
        for part in (*vmd.children(), *vmd.model.children()):
            if not isinstance(part, PreTrainedModel):
                part.to(device=device, dtype=model.dtype)
        return vmd.train(model.training)

    def get_output_embeddings(self):
        return self.model.language_model.get_output_embeddings() if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, new_embeddings):
        if self.lm_head is None:
            self.model.language_model.set_output_embeddings(new_embeddings)
        else:
            self.lm_head = new_embeddings

    def loss_function(self, *args, **kwargs):
        """Where transformers has a loss for others to call, next-token prediction by default."""
        raise ValueError(f"loss_function must not be called: {OWN_LOSS}")

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) to (..., vocab_size), -inf at the tokens that may never appear."""
        logits = self.model.head(hidden_states) if self.lm_head is None else self.lm_head(hidden_states)
        if self.lm_head is None and self.tp_size:
            logits = logits.clone()  # what was gathered from several processes may not be written to
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
                z = mean + std * latent_noise.
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
        batch = read_clean(self, input_ids, labels, attention_mask, position_ids)
        if position_noise is not None:
            check_shape("position_noise", position_noise, input_ids.shape)
            position_noise = batch.layout.scatter(position_noise, 0.0)
        corruption, noise = corrupt(self, batch, times, position_noise, latent_noise, noise_seeds)
        if self.chain is not None:
            loss = chain_loss(self, batch, corruption, num_items_in_batch, **kwargs)
        else:
            loss = variational_loss(self, batch, corruption, noise, num_items_in_batch, **kwargs)
        if batch.clean_states is not None:
            loss.loss = loss.loss + self.config.causal_loss_weight * next_token_loss(self, batch, num_items_in_batch)
        return VMDMaskedDiffusionOutput(
            loss=loss.loss,
            reconstruction_loss=loss.reconstruction_loss,
            kl=loss.kl,
            kl_per_latent=loss.kl_per_latent,
            posterior_shift=loss.posterior_shift,
            hidden_states=gather_hidden_states(loss.outputs.hidden_states, loss.layout),
            attentions=loss.outputs.attentions,
        )

    def kl_weight(self) -> float | torch.Tensor:
        """Weight of the KL term; in training it warms up, and a call with gradients counts as a step of it."""
        beta = self.config.kl_weight
        if not (self.training and self.config.kl_warmup_steps and self.config.gaussian_size):
            return beta
        progress = self.latent_encoder.kl_warmup_progress
        if torch.is_grad_enabled():
            progress += 1
        # Cubic: the latent is learned while it is almost free. Under a linear one part of it is given up early.
        return beta * (progress / self.config.kl_warmup_steps).clamp(max=1) ** 3


__all__ = ["VMDForMaskedDiffusion", "VMDMaskedDiffusionOutput", "VMDModel", "VMDPreTrainedModel"]
