"""Checks of what users pass: each error names the argument, the rule and the value."""

import torch
from transformers.utils import TransformersKwargs

# What forward takes beside its own arguments.
_KEYWORDS = {*TransformersKwargs.__annotations__, "return_dict", "use_cache"}

OWN_LOSS = (
    "the model computes its own loss when forward gets labels, and a trainer with a loss of its own, such as TRL's "
    "SFTTrainer, would train next-token prediction; use the plain Trainer, or vmd_hf.training.trl.VMDSFTTrainer"
)


def require(holds: torch.Tensor, message: str) -> None:
    """Raises unless the scalar bool tensor is true. On an accelerator this does not wait for it: the error is
    raised by the device, some operations later.

    Raises:
        ValueError: on the CPU. (RuntimeError elsewhere, and in compiled code.)
    """
    if torch.compiler.is_compiling() or holds.device.type != "cpu":
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


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
    has_table = config.position_embedding_type in ("learned", "both") or config.position_groups
    if config.block_size is None:  # else the positions are those in a block
        has_table = has_table or config.latent_input != "layers"
    if not has_table and config.backbone_config is None:
        return
    limit = config.max_position_embeddings
    rule = f"input_ids must have at most max_position_embeddings = {limit} tokens with a position table"
    if position_ids is not None:
        require(position_ids.max() < limit, f"{rule}, got position_ids beyond")
    elif input_ids.shape[1] > limit:
        if attention_mask is None:
            raise ValueError(f"{rule}, got {input_ids.shape[1]}")
        require(attention_mask.ne(0).sum(-1).max() <= limit, f"{rule}, got more")


def check_masks(input_ids, config):
    """There is something to denoise."""
    if config.mask_token_id is not None:
        require(
            (input_ids == config.mask_token_id).any(),
            f"input_ids must hold mask tokens when the denoiser alone is trained, got none: {OWN_LOSS}",
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


def check_labels(input_ids, labels, attention_mask, config):
    """Labels are clean tokens that may be predicted, and equal the inputs where they are not -100."""
    if config.mask_token_id is None:
        raise ValueError("mask_token_id must be set in the config to compute a loss, got None")
    check_shape("labels", labels, input_ids.shape)
    labelled = labels != -100
    if attention_mask is not None:
        require(
            ~(labelled & (attention_mask == 0)).any(),
            "labels must be -100 where attention_mask is 0, got a label on padding",
        )
    impossible = torch.zeros_like(labelled)
    for token_id in config.forbidden_token_ids:
        impossible = impossible | (labels == token_id)
    require(
        ~impossible.any(),
        "labels must not hold the mask token or the pad token (use -100 for padding), whose probability is 0: "
        f"ids {config.forbidden_token_ids}",
    )
    require(
        ~(labelled & (labels != input_ids)).any(),
        "labels must equal input_ids where they are not -100, since the model draws the noise itself; a collator "
        "that masks tokens is the usual cause: use DataCollatorForLanguageModeling(tokenizer, mlm=False)",
    )


def check_noise(times, latent_noise, shape, latent_shape, config):
    """Given noise has the right shape (`shape`: (batch,) or (batch, N)), and times lie in the objective's range."""
    if times is not None:
        check_shape("times", times, shape)
        if config.objective == "vmd":
            holds, rule = (times > 0) & (times <= 1), "times must lie in (0, 1] under the vmd objective"
        else:
            holds, rule = (times >= 0) & (times < 1), f"times must lie in [0, 1) under {config.objective}"
        require(holds.all(), f"{rule}, got others")
    if latent_noise is not None:
        check_shape("latent_noise", latent_noise, (*shape, *latent_shape))


__all__ = [
    "OWN_LOSS",
    "check_inputs",
    "check_keywords",
    "check_labels",
    "check_latents",
    "check_masks",
    "check_noise",
    "check_shape",
    "require",
]
