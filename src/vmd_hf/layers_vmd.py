"""Transformer layers: attention, feed-forward, and adaLN, by which a conditioning vector changes both."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks_vmd import AttentionChunks
from .configuration_vmd import VMDConfig

if torch.distributed.is_available():
    # Tensor parallelism (`VMDConfig.base_model_tp_plan`): each process has the rows of some heads, of the weights for
    # queries, keys and values each, or of one weight.
    ALL_PARALLEL_STYLES.register("vmd_qkv_heads", PackedColwiseParallel(split_factor=3))
    ALL_PARALLEL_STYLES.register("vmd_heads", PackedColwiseParallel(split_factor=1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain operations, which can also return its weights (batch, heads, queries, keys)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class VMDUnitLinear(nn.Linear):
    """A linear layer that keeps unit scale at the start (see `VMDPreTrainedModel._init_weights`)."""


class VMDZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero (see `VMDPreTrainedModel._init_weights`)."""


class VMDGroupBias(nn.Linear):
    """What a layer's heads add to the scores of positions that are in the same groups: at the start one head in turn
    looks at each grouping, and one in `groupings + 1` at none (see `VMDPreTrainedModel._init_weights`)."""

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
        context_key=None,
        context_value=None,
        attention_mask=None,
        position_embeddings=None,
        same_group=None,
        room=None,
        **kwargs,
    ):
        """Output (batch, length, hidden), attention weights or `None`, and this pass's own key and value.

        `context_key` and `context_value` (batch, heads, read, head_dim) are those of earlier tokens; `room`: the two
        tensors whose first columns these are, behind which this pass may write its own.
        """
        shape = hidden_states.shape[:-1]
        qkv = self.qkv_proj(hidden_states).view(*shape, 3, -1, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, batch, heads, length, head_dim)
        if position_embeddings is None:
            query, own_key, own_value = qkv.unbind(0)
        else:
            query_and_key, own_value = qkv.split([2, 1])
            query, own_key = rotate(query_and_key, *position_embeddings).unbind(0)
            own_value = own_value.squeeze(0)
        if isinstance(attention_mask, AttentionChunks):
            keys, values = [context_key, own_key], [context_value, own_value]
            output, weights = self.attend_in_chunks(query, keys, values, attention_mask, **kwargs), None
        else:
            if self.group_bias is not None:
                attention_mask = self.group_bias(same_group, attention_mask).to(query.dtype)
            key, value = (
                append(*parts)
                for parts in zip((context_key, context_value), (own_key, own_value), room or (None, None), strict=True)
            )
            output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*shape, -1)), weights, own_key, own_value

    def attend(self, query, key, value, attention_mask, **kwargs):
        """(batch, length, heads, head_dim), and the weights or `None`."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        return attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def attend_in_chunks(self, query, keys: list, values: list, chunks: AttentionChunks, **kwargs):
        # The gradient of a piece is as large as the piece, that of a slice as large as what it is taken from.
        keys, values = (
            [piece for part in parts if part is not None for piece in chunks.split(part, 2)]
            for parts in (keys, values)
        )
        outputs = []
        for piece, seen, mask in zip(chunks.split(query, 2), chunks.keys, chunks.masks, strict=True):
            key, value = (torch.cat([parts[index] for index in seen], dim=2) for parts in (keys, values))
            outputs.append(self.attend(piece, key, value, mask, **kwargs)[0])
        return torch.cat(outputs, dim=1)


def append(context: torch.Tensor | None, own: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    """Keys or values (batch, heads, tokens, head_dim) of a context, or `None`, and of a pass: in `room`, if there is
    some, whose first columns are the context."""
    if context is None:
        return own
    if room is None:
        return torch.cat([context, own], dim=2)
    start, stop = context.shape[2], context.shape[2] + own.shape[2]
    room[:, :, start:stop] = own
    return room[:, :, :stop]


def rotary_angles(rotary_emb: nn.Module, hidden_states: torch.Tensor, position_ids: torch.Tensor):
    """For `rotate`: cosines, and sines with the sign that they have in the first and second half of a vector, each
    (batch, 1, length, head_dim)."""
    cos, sin = rotary_emb(hidden_states, position_ids)
    half = sin.shape[-1] // 2
    return cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, None]


def rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (as in Llama: a vector's halves are the coordinates) of (..., length, head_dim)."""
    return torch.addcmul(vectors * cos, vectors.roll(vectors.shape[-1] // 2, -1), sin)


class VMDMLP(nn.Module):
    def __init__(self, config: VMDConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class VMDLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer, of which a conditioning vector may shift, scale and gate both halves (adaLN).

    The map from that vector has no bias and starts at zero, and its gates are added to 1: a zero vector, and an
    untrained map, leave the layer as it is.
    """

    def __init__(self, config: VMDConfig, layer_idx: int, conditioned: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.attention = VMDAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.mlp = VMDMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        size = config.conditioning_size + 1, 6 * config.hidden_size
        self.modulation = VMDZeroLinear(*size, bias=False) if conditioned else None
        self._last_changes = None, None

    def forward(
        self, hidden_states, conditioning=None, context_key=None, context_value=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The new hidden states, and the layer's own key and value.

        Args:
            hidden_states: (batch, length, hidden).
            conditioning: (batch, blocks, conditioning_size + 1): of each of the row's equal blocks.
            context_key, context_value, kwargs: Of the attention.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.changes(conditioning)
        update, _, key, value = self.attention(
            modulate(self.attention_norm(hidden_states), shift_1, scale_1), context_key, context_value, **kwargs
        )
        hidden_states = add_gated(hidden_states, self.dropout(update) if self.training else update, gate_1)
        update = self.mlp(modulate(self.mlp_norm(hidden_states), shift_2, scale_2))
        return add_gated(hidden_states, self.dropout(update) if self.training else update, gate_2), key, value

    def changes(self, conditioning) -> tuple[torch.Tensor | None, ...]:
        """Shift, 1 + scale and 1 + gate of both halves, each (batch, blocks, hidden); `None` for no change. Sampling
        steps that share a latent share what was made of it."""
        if conditioning is None or self.modulation is None:
            return (None,) * 6
        remember = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if remember and self._last_changes[0] is conditioning:
            return self._last_changes[1]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(conditioning).chunk(6, dim=-1)
        changes = shift_1, 1 + scale_1, 1 + gate_1, shift_2, 1 + scale_2, 1 + gate_2
        self._last_changes = (conditioning, changes) if remember else (None, None)
        return changes


def modulate(hidden_states, shift, scale):
    """(batch, length, hidden) with one shift and factor (batch, blocks, hidden) for each of its equal blocks."""
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
    blocks = residual.unflatten(1, shape), gate[:, :, None], update.unflatten(1, shape)
    return torch.addcmul(*blocks).flatten(1, 2)


__all__ = ["VMDGroupBias", "VMDLayer", "VMDZeroLinear", "append", "eager_attention_forward", "rotary_angles"]
