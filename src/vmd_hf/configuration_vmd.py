"""Configuration of Variational Masked Diffusion models (arXiv 2510.23606)."""

import math
import sys
from functools import wraps
from typing import Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

# Keyword arguments that `PreTrainedConfig` takes beside its declared fields.
_BASE_KEYWORDS = {
    "_commit_hash",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


# Fields of version 0.7, which its files have. (Those of 0.8 have objective_draws, too, which training alone read.)
REMOVED_FIELDS = {
    "conditioner_initializer_range",
    "free_bits",
    "latent_encoder_pooling",
    "latent_per_position",
    "latent_position_inputs",
}


def converted(values: dict) -> dict:
    """Arguments of a config, those of version 0.7 replaced by what they mean today.

    Raises:
        ValueError: for `latent_encoder_pooling="concat"`, which no model has any more.
    """
    if values.get("latent_encoder_pooling") == "concat":
        raise ValueError("latent_encoder_pooling='concat' of version 0.7 is no longer supported")
    new = {name: value for name, value in values.items() if name not in REMOVED_FIELDS | {"objective_draws"}}
    if values.get("latent_per_position"):
        new["latent_input"] = "position_slices"
    elif values.get("latent_position_inputs"):
        new["latent_input"] = "layers_and_positions"
    return new


@strict
class VMDConfig(PreTrainedConfig):
    r"""Configuration of [`VMDModel`] and [`VMDForMaskedDiffusion`].

    `latent_size = 0` is the plain masked diffusion model (MDM, MDLM): the same network without the latent path.

    Args:
        vocab_size: Number of tokens, special tokens (mask, pad, ...) included.
        hidden_size: Width of the transformer; a multiple of `num_attention_heads`.
        num_hidden_layers: Layers of the denoiser.
        num_loops: How often the stack of layers is run through, with the same weights: depth without parameters
            (sudoku.yaml).
        loop_loss: In training mode the cross-entropy of what every earlier loop would have predicted, their mean, is
            added to the loss, and to nothing that is reported (sudoku.yaml).
        num_attention_heads: Attention heads. With rotary positions, `hidden_size / num_attention_heads` is even.
        intermediate_size: Width of the feed-forward layers; `None` means `4 * hidden_size`.
        hidden_act: Activation of the feed-forward layers, a name that transformers knows.
        max_position_embeddings: Longest sequence. A hard limit where there is a position table.
        position_embedding_type: `"rotary"`, `"learned"` (a table of `max_position_embeddings` rows added to the
            embeddings), `"both"` (default) or `"none"` (only `position_groups` tell the positions apart). Rotary
            positions alone give every mask of a sequence that is masked throughout the same prediction: with a latent
            they need `position_groups` beside them (sotu.yaml).
        position_groups: Lists of `max_position_embeddings` group numbers, one list a grouping: position `i` gets the
            embedding of its group in each of them, added to the token embedding: rows, columns and boxes of a grid
            (sudoku.yaml), or the position in a block (sotu.yaml).
        position_group_bias: Whether two positions in the same group of a grouping also attend to one another by a
            number learned for each layer, head and grouping, added to the scores (sudoku.yaml). Whole sequences,
            eager or sdpa attention.
        rope_parameters: Rotary settings as everywhere in transformers (`rope_type`, `rope_theta`, ...).
        latent_type: `"gaussian"`, the paper's z ~ N(0, I) with a learned posterior, or `"chain"`: a state behind each
            token that is revealed, its memory for the next one (see `chain_vmd.py`). Its posterior is known, so a
            chain has no KL term and no encoder, and fields about these do not concern it.
        latent_size: Dimensions of the latent `z`, or states of the chain; 0 for no latent. With
            `latent_input="position_slices"`, of all slices together.
        conditioning_size: Width of the conditioning vector that is computed from `z` (from each slice of it). For a
            chain, the rank of what tilts the emissions of its states.
        candidate_tokens: For a chain, the number of tokens, the most probable ones at a position, whose probability
            depends on the state; all others together have a share of it that does. Cost and memory of the emissions
            grow with it, and not with the vocabulary.
        causal_head_size: Width of a recurrent network that reads the tokens of a step one after another, each of which
            depends on those before it (see `causal_vmd.py`; what the chain is measured against); 0 for none.
        latent_input: How z enters the denoiser. `"layers"`: by adaLN in every layer. `"layers_and_positions"`: z also
            adds to the input of each position (of a block, or up to `max_position_embeddings`) a vector of its own,
            for `conditioning_size * hidden_size` weights a position (sotu_latent.yaml). `"position_slices"`: z is a
            slice for each of these positions, read by the posterior from that position's token and added to its
            input, and changes no layer: noisy hints that the denoiser reads together (boards.yaml). The slices of
            tokens that a step does not reveal (under `vmd`, that are not masked) equal the prior.
        num_latent_encoder_layers: Transformer layers of the posterior `q(z | x_0, x_t)`.
        block_size: Tokens a block: the model is autoregressive over blocks, each with its own latent, time and
            denoising (block diffusion; sotu.yaml). `None`: one latent for the whole sequence.
        prior: `"standard"`: z ~ N(0, I). `"learned"`, with blocks only: a diagonal Gaussian p(z | clean earlier
            blocks), which costs generation one forward pass a block (sotu_latent.yaml).
        objective: `"vmd"` (the paper's, default), `"per_sample"` or `"per_step"`: see `objective_vmd.py`.
        objective_steps: Numbers of sampling steps that `per_sample` and `per_step` train for; one is drawn for
            each row.
        left_to_right: Share of blocks (or rows) for which `per_sample` and `per_step` reveal tokens from left to right
            rather than in random order: for the sampler with `remasking="left_to_right"`.
        latent_min_tokens: Under `per_step`, a step that reveals fewer tokens has the null latent, in training, bounds
            and `generate` alike: it is a step of a plain masked diffusion model (sotu_latent.yaml). A single token
            needs no latent, and a random one would be noise. (A step with a `confidence_threshold` may reveal all that
            is masked.)
        kl_weight: Weight (beta) of the KL term.
        kl_warmup_steps: Training forward passes over which the weight of the KL term grows from 0 to `kl_weight`, as
            the cube of their share (all recipes with a latent). Without it the posterior tends to collapse. 0 turns it
            off. Its progress is saved with the weights, but not with an adapter of PEFT: train one on a model that was
            loaded with `kl_warmup_steps=0`, or it warms up again from where the model stopped, whenever it is resumed.
        time_epsilon: Smallest time of the `vmd` objective: `t = eps + (1 - eps) u`.
        mask_token_id: Id of the mask token. It never has probability.
        pad_token_id: Id of the pad token. It never has probability, unless it is also an end-of-sequence token.
        eos_token_id: Id(s) of the end-of-sequence token.
        backbone_config: Config of a language model of transformers that is the denoiser in the place of this package's
            own (see `VMDForMaskedDiffusion.from_masked_lm` and `from_causal_lm`); `None` for the package's own.
        backbone_type: Whether that is a masked or a causal language model, `"masked_lm"` or `"causal_lm"`. The clean
            tokens of a causal one attend to nothing on their right, in their own block either.
        token_shift: Whether the hidden state before a token predicts it, as in a causal language model, or the one at
            its own place. Backbones in blocks only.
        causal_loss_weight: In training mode this times the next-token cross-entropy of the clean tokens is added to
            the loss, and to nothing that is reported: it keeps the causal language model that a backbone is.
        tie_word_embeddings: Whether the output projection is the token embedding.
        attention_dropout, hidden_dropout: Dropout probabilities.
        norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of the normal initialisation.

    Raises:
        ValueError: where the config is made, when a value breaks a rule above or a name is unknown.
    """

    model_type = "vmd"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012, the Trainer adds a list to it
        "reconstruction_loss",
        "kl",
        "kl_per_latent",
        "posterior_shift",
        "hidden_states",
        "attentions",
    ]

    vocab_size: int = 32_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_loops: int = 1
    loop_loss: bool = False
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["rotary", "learned", "both", "none"] = "both"
    position_groups: list[list[int]] | None = None
    position_group_bias: bool = False
    rope_parameters: dict | None = None
    latent_type: Literal["gaussian", "chain"] = "gaussian"
    latent_size: int = 64
    conditioning_size: int = 128
    candidate_tokens: int = 128
    causal_head_size: int = 0
    latent_input: Literal["layers", "layers_and_positions", "position_slices"] = "layers"
    num_latent_encoder_layers: int = 1
    block_size: int | None = None
    prior: Literal["standard", "learned"] = "standard"
    objective: Literal["vmd", "per_sample", "per_step"] = "vmd"
    objective_steps: list[int] | tuple[int, ...] = (1, 2, 4)
    left_to_right: float | int = 0.0
    latent_min_tokens: int = 1
    kl_weight: float | int = 1.0
    kl_warmup_steps: int = 1000
    time_epsilon: float = 1e-3
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_type: Literal["masked_lm", "causal_lm"] = "masked_lm"
    token_shift: bool = False
    causal_loss_weight: float | int = 0.0
    tie_word_embeddings: bool = True
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.transformers_version is not None:
            kwargs = converted(kwargs)
            self.latent_input = kwargs.pop("latent_input", self.latent_input)
        # A file written by another version of transformers may hold names that this one does not know; what a
        # person writes may not.
        if self.transformers_version is None and (unknown := sorted(set(kwargs) - _BASE_KEYWORDS)):
            raise ValueError(f"VMDConfig knows no argument {', '.join(map(repr, unknown))}")
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(f"model_type must be {self.model_type!r}, got {kwargs['model_type']!r}")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.objective_steps = list(self.objective_steps)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """As everywhere. PEFT asks for it before it looks up what `LoraConfig()` adapts in a model of this type, which
        it is told here: it may have been imported at any time before."""
        if (peft := sys.modules.get("peft")) is not None:
            targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            # The package's own layers, and what a backbone may call the projections to queries and values.
            names = ["qkv_proj", "o_proj", "query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "query_proj"]
            targets.setdefault(self.model_type, [*names, "value_proj", "Wqkv", "c_attn"])
        return super().to_dict()

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """How `tp_plan="auto"` splits the denoiser's layers. All else is replicated; a backbone has its own plan."""
        if self.backbone_config is not None:
            return None
        plan = {
            "layers.*.attention.qkv_proj": "vmd_qkv_heads",  # see layers_vmd.py
            "layers.*.attention.o_proj": "rowwise",
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": "rowwise",
        }
        return plan | ({"layers.*.attention.group_bias": "vmd_heads"} if self.position_group_bias else {})

    @property
    def gaussian_size(self) -> int:
        """Dimensions of a Gaussian latent, 0 without one."""
        return self.latent_size if self.latent_type == "gaussian" else 0

    @property
    def num_states(self) -> int:
        """States of a chain, 0 without one."""
        return self.latent_size if self.latent_type == "chain" else 0

    @property
    def positions_per_latent(self) -> int:
        """Positions of a block, or of the longest sequence."""
        return self.block_size or self.max_position_embeddings

    @property
    def num_latent_slices(self) -> int:
        """1, or the number of positions with `latent_input="position_slices"`."""
        return self.positions_per_latent if self.latent_input == "position_slices" else 1

    @property
    def forbidden_token_ids(self) -> list[int]:
        """Ids that have probability 0 in every likelihood, loss and sampler: mask, and pad unless it ends a text."""
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        forbidden = {self.mask_token_id, None if self.pad_token_id in eos else self.pad_token_id}
        return sorted(forbidden - {None})

    def validate_sizes(self):
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "conditioning_size")
        numbers = ("num_hidden_layers", "num_loops", "max_position_embeddings", "num_latent_encoder_layers")
        for name in (*sizes, *numbers, "candidate_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.latent_size < 0:
            raise ValueError(f"latent_size must be 0 (no latent) or more, got {self.latent_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.position_embedding_type in ("rotary", "both") and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                "hidden_size / num_attention_heads must be even with rotary positions, got "
                f"{self.hidden_size} / {self.num_attention_heads}"
            )
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be None (whole sequences) or at least 1, got {self.block_size}")
        if self.prior == "learned" and (self.block_size is None or self.gaussian_size == 0):
            raise ValueError(
                "prior='learned' needs blocks, whose earlier ones it sees, and a Gaussian latent, got "
                f"block_size={self.block_size}, latent_size={self.latent_size} and latent_type={self.latent_type!r}"
            )
        if self.latent_input != "layers" and (self.gaussian_size == 0 or self.backbone_config is not None):
            raise ValueError(
                f"latent_input={self.latent_input!r} needs a Gaussian latent and no backbone, got "
                f"latent_size={self.latent_size}, latent_type={self.latent_type!r} and "
                f"backbone_config={self.backbone_config}"
            )
        if self.num_states and (self.objective == "per_sample" or self.latent_min_tokens > 1):
            raise ValueError(
                "latent_type='chain' needs objective 'vmd' or 'per_step' and latent_min_tokens 1, got "
                f"{self.objective!r} and {self.latent_min_tokens}"
            )
        if self.causal_head_size < 0 or (self.causal_head_size and (self.latent_size or self.objective == "vmd")):
            raise ValueError(
                "causal_head_size must be 0, or above with latent_size 0 and objective 'per_step' or 'per_sample', "
                f"got {self.causal_head_size}, {self.latent_size} and {self.objective!r}"
            )
        if self.latent_size % self.num_latent_slices:
            raise ValueError(
                f"latent_size must be a multiple of the positions, {self.positions_per_latent}, with "
                f"latent_input='position_slices', got {self.latent_size}"
            )
        if self.loop_loss and self.num_loops == 1:
            raise ValueError("loop_loss needs num_loops of at least 2, got 1")
        if self.backbone_config is not None and (self.prior == "learned" or self.num_loops > 1):
            raise ValueError(
                "a backbone is run through once and has no prior of its own: num_loops must be 1 and prior "
                f"'standard', got {self.num_loops} and {self.prior!r}"
            )
        causal = self.backbone_config is not None and self.backbone_type == "causal_lm"
        if self.backbone_type == "causal_lm" and (not causal or self.block_size is None):
            raise ValueError(
                "backbone_type='causal_lm' needs a backbone_config and block_size, the tokens of a block, got "
                f"{type(self.backbone_config).__name__} and {self.block_size}"
            )
        if self.token_shift and (self.backbone_config is None or self.block_size is None):
            raise ValueError(
                "token_shift needs a backbone_config and block_size, got "
                f"{type(self.backbone_config).__name__} and {self.block_size}"
            )
        if self.causal_loss_weight and not causal:
            raise ValueError(
                "causal_loss_weight needs backbone_type='causal_lm', got "
                f"{self.causal_loss_weight} and {self.backbone_type!r}"
            )
        from transformers.activations import ACT2FN  # which needs torch

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation that transformers knows, got {self.hidden_act!r}")

    def validate_position_groups(self):
        if self.position_group_bias and (not self.position_groups or self.block_size is not None):
            raise ValueError(
                "position_group_bias needs position_groups and whole sequences, got "
                f"position_groups={self.position_groups} and block_size={self.block_size}"
            )
        for groups in self.position_groups or []:
            if len(groups) != self.max_position_embeddings:
                raise ValueError(
                    "each list of position_groups must have max_position_embeddings = "
                    f"{self.max_position_embeddings} entries, got {len(groups)}"
                )
            if min(groups) < 0:
                raise ValueError(f"position_groups must be 0 or more, got {min(groups)}")

    def validate_objective(self):
        if not self.objective_steps or min(self.objective_steps) < 1:
            raise ValueError(
                f"objective_steps must be one or more numbers of at least 1, got {list(self.objective_steps)}"
            )
        if not 0 <= self.left_to_right <= 1 or (self.left_to_right and self.objective == "vmd"):
            raise ValueError(
                "left_to_right must lie in [0, 1], and be 0 under the vmd objective, which has no order, got "
                f"{self.left_to_right} and {self.objective!r}"
            )
        if self.latent_min_tokens < 1 or (self.latent_min_tokens > 1 and self.objective != "per_step"):
            raise ValueError(
                'latent_min_tokens must be at least 1, and 1 unless objective is "per_step", got '
                f"{self.latent_min_tokens} and {self.objective!r}"
            )
        for name in ("kl_weight", "kl_warmup_steps", "initializer_range", "causal_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.time_epsilon < 1:
            raise ValueError(f"time_epsilon must lie in (0, 1), got {self.time_epsilon}")

    def validate_special_tokens(self):
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        ids = [("mask_token_id", self.mask_token_id), ("pad_token_id", self.pad_token_id)]
        for name, value in ids + [("eos_token_id", value) for value in eos]:
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} must lie in [0, vocab_size = {self.vocab_size}), got {value}")
        if self.mask_token_id is not None and self.mask_token_id in [self.pad_token_id, *eos]:
            raise ValueError(
                f"mask_token_id must differ from pad_token_id and eos_token_id, got {self.mask_token_id} for both"
            )


def _with_value_errors(function):
    """The errors of `@strict` are no ValueErrors, which users catch."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    return wrapper


VMDConfig.__init__ = _with_value_errors(VMDConfig.__init__)
VMDConfig.validate = _with_value_errors(VMDConfig.validate)


__all__ = ["REMOVED_FIELDS", "VMDConfig"]
