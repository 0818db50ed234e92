"""What every denoiser of this package offers, its own and those around other models: tokens on a grid of blocks and
conditioning vectors in, hidden states and keys and values of clean tokens out."""

from dataclasses import dataclass

import torch
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults

from .blocks_vmd import CleanContext, Layout, lay_out_blocks, lay_out_rows
from .checks_vmd import check_inputs, check_keywords, check_latents, check_masks, require
from .layers_vmd import rotary_angles
from .objective_vmd import last_before_blocks
from .saving_vmd import VMDPreTrainedModel


@dataclass
class VMDModelOutput(ModelOutput):
    """Output of [`VMDModel`].

    Attributes:
        last_hidden_state: (batch, length, hidden_size), after the final norm.
        keys_values: Of clean tokens that were read in this pass, a pair for each layer; inside the package only.
        before: With `token_shift`, what a [`CleanContext`] holds under this name; inside the package only.
        hidden_states, attentions: As everywhere in transformers, on request.
    """

    last_hidden_state: torch.Tensor | None = None
    keys_values: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class VMDDenoiser(VMDPreTrainedModel):
    """The interface. A subclass has `embeddings`, `conditioner` and `latent_prior` (modules or `None`), and `run`."""

    has_head = False  # whether it is part of a VMDForMaskedDiffusion

    def lay_out(self, input_ids, attention_mask=None, position_ids=None) -> Layout:
        """How the rows are laid out for `run`: as they are, or on a grid of blocks. Checks shapes."""
        check_inputs(input_ids, attention_mask, position_ids, self.config)
        if self.config.block_size is not None:
            layout = lay_out_blocks(input_ids, attention_mask, position_ids, self.config.block_size)
            layout.causal = self.config.backbone_type == "causal_lm"
            return layout
        layout = lay_out_rows(input_ids, attention_mask, position_ids)
        if layout.document is not None and (self.config.gaussian_size or self.config.causal_head_size):
            require(
                layout.document.amax() == 0,
                "position_ids must not restart within a row where block_size is None and there is a latent, which "
                "documents packed into the row would share: pack with block_size or latent_size = 0",
            )
        return layout

    def attention_context(self, hidden_states, attention_mask, position_ids, document=None) -> dict:
        """Arguments of a layer's attention for whole rows: its mask, and what it knows of positions.

        Args:
            hidden_states: (batch, length, hidden).
            attention_mask: (batch, length), 0 for padding, or `None`.
            position_ids: (batch, length).
            document: (batch, length), which of a packed row's texts a token belongs to, or `None` for one.
        """
        documents = None
        if document is not None:
            if is_flash_attention_requested(self.config):
                raise ValueError(
                    "attn_implementation must be 'eager', 'sdpa' or 'flex_attention' with packed rows, got "
                    f"{self.config._attn_implementation!r}"
                )
            documents = packed_sequence_mask_function(document)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            and_mask_function=documents,
        )
        return {"attention_mask": mask, "position_embeddings": self.rotary_angles(hidden_states, position_ids)}

    def rotary_angles(self, hidden_states, position_ids):
        return None if self.rotary_emb is None else rotary_angles(self.rotary_emb, hidden_states, position_ids)

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
        conditioning: torch.Tensor | None = None,
        for_head: bool = False,
        **kwargs,
    ) -> VMDModelOutput:
        """
        Args:
            input_ids: (batch, length) int64, x_t: tokens, some of them the mask token.
            attention_mask: (batch, length), 1 for tokens and 0 for padding, on either side.
            position_ids: (batch, length); default: counted in each row without its padding. A position that is no
                larger than the one before it starts a new document, which sees nothing of the others.
            latents: (batch, latent_size), with blocks (batch, blocks, latent_size); default: zeros, the prior mean.
            layout: With it, `input_ids` are on its grid already, and so is what comes back.
            context: With blocks and `layout`, the clean tokens that the blocks see; default: earlier blocks of
                `input_ids` as they stand.
            clean: With blocks and `layout`, `input_ids` are clean tokens to be read: block-causal, under the null
                latent. The output has their keys and values.
            conditioning: With `layout`, what `condition` made of the latents; `None`: the null latent.
            for_head: Whether [`VMDForMaskedDiffusion`] asks, whose part this model may be.

        Returns:
            `last_hidden_state` (batch, length, hidden_size), after the final norm: of each column that from which its
            token is predicted, but of `clean` tokens their own. With blocks, `attentions` are those on the grid, of
            queries and keys [clean, noisy].

        Raises:
            ValueError: for a wrong shape, or more tokens than a position table has; and where somebody else than its
                `VMDForMaskedDiffusion` trains it on clean tokens, as a next-token loss would.
        """
        if self.has_head and self.training and torch.is_grad_enabled() and not for_head and layout is None:
            check_masks(input_ids, self.config)
        if layout is not None:
            return self.run(input_ids, layout, conditioning, context, clean, return_dict=True, **kwargs)
        check_keywords(kwargs)
        layout = self.lay_out(input_ids, attention_mask, position_ids)
        check_latents(latents, self.config, layout, input_ids.shape[0])
        grid = layout.scatter(input_ids, 0)
        if self.latent_prior is not None and latents is None:
            # Not by `read`, whose call an exporter would take for one with the public arguments.
            hidden_states, context = read_context(grid, self.run(grid, layout, clean=True, return_dict=True), layout)
            latents, _ = self.latent_prior(last_before_blocks(hidden_states, layout))
        elif self.config.block_size is not None:
            context = CleanContext(
                input_ids=grid, position_ids=layout.position_ids, new=layout.token_index(clean=True)
            )
        if self.conditioner is not None:
            if latents is None:
                latents = torch.zeros(grid.shape[0], self.config.gaussian_size, device=grid.device)
                latents = latents[:, None].expand(-1, layout.num_blocks, -1)
            conditioning = self.condition(latents.view(grid.shape[0], layout.num_blocks, -1))
        outputs = self.run(grid, layout, conditioning, context, return_dict=True, **kwargs)
        return VMDModelOutput(
            last_hidden_state=layout.gather(outputs.last_hidden_state),
            hidden_states=gather_hidden_states(outputs.hidden_states, layout),
            attentions=outputs.attentions,
        )

    def run(self, input_ids, layout, conditioning=None, context=None, clean=False, **kwargs) -> VMDModelOutput:
        """One pass over blocks (or whole sequences) on their grid, and over the clean tokens still to be read.
        Arguments as in `forward`."""
        raise NotImplementedError

    def read(
        self, input_ids: torch.LongTensor, layout: Layout, context: CleanContext | None = None
    ) -> tuple[torch.Tensor, CleanContext]:
        """Reads clean tokens on the grid in a pass of their own.

        Returns:
            Hidden states (batch, N * width, hidden_size), and what `run` needs to know of these tokens.
        """
        outputs = self(input_ids, layout=layout, context=context, clean=True, return_dict=True)
        return read_context(input_ids, outputs, layout)

    def condition(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, N, latent_size) to conditioning vectors (batch, N, ..., conditioning_size + 1)."""
        return self.conditioner(latents)

    def for_steps(self, conditioning: torch.Tensor | None, num_revealed: torch.Tensor) -> torch.Tensor | None:
        """The conditioning of blocks that reveal (batch, N) tokens in a step: that of the null latent where these are
        fewer than `latent_min_tokens`."""
        if conditioning is None or self.config.latent_min_tokens == 1:
            return conditioning
        enough = num_revealed >= self.config.latent_min_tokens
        return conditioning * enough.view(*enough.shape, *[1] * (conditioning.dim() - enough.dim()))


def read_context(
    input_ids: torch.Tensor, outputs: VMDModelOutput, layout: Layout
) -> tuple[torch.Tensor, CleanContext]:
    """Hidden states of a pass over clean tokens on the grid, and what later passes need to know of it: where it gave
    no keys and values, all of them read the tokens again."""
    places = layout.token_index(clean=True)
    if outputs.keys_values is None:
        context = CleanContext(input_ids=input_ids, position_ids=layout.position_ids, new=places)
    else:
        context = CleanContext(outputs.keys_values, places)
    context.before = outputs.before
    return outputs.last_hidden_state, context


def gather_hidden_states(hidden_states, layout: Layout):
    """Each of `hidden_states` (or `None`, where not selected), [clean tokens, grid], for the rows' own columns."""
    if hidden_states is None:
        return None
    length = layout.num_blocks * layout.width
    own = (state if state is None or state.shape[1] == length else state[:, -length:] for state in hidden_states)
    return tuple(None if state is None else layout.gather(state) for state in own)


__all__ = ["VMDDenoiser", "VMDModelOutput", "gather_hidden_states"]
