"""How to see that a training learns nothing, or gives up its latent, and what to try then."""

import torch

# A loss above this share of the unigram entropy counts as no better than it: the loss of a hundred steps is noisy.
AT_UNIGRAM_ENTROPY = 0.98
ACTIVE_UNIT_VARIANCE = 0.01


def moments(shift: torch.Tensor) -> torch.Tensor:
    """(3, latent_size) of posterior shifts (..., latent_size): how many are not exactly 0 (they are where a step does
    without a latent, and in slices of tokens that it does not reveal), their sum, and that of their squares."""
    shift = shift.flatten(0, -2)
    return torch.stack([shift != 0, shift, shift.square()]).sum(1)


def active_units(sums: torch.Tensor) -> int:
    """Latent dimensions that the posterior uses, of sums of `moments`: those in which its mean varies by a variance
    above 0.01 (Burda, Grosse, Salakhutdinov, arXiv 1509.00519)."""
    count, *powers = sums
    mean, square = (power / count for power in powers)  # NaN, so not active, where there are none
    return int((square - mean.square() > ACTIVE_UNIT_VARIANCE).sum())


def unigram_entropy(counts: torch.Tensor) -> float:
    """Entropy of single tokens in nats, of how often each of the vocabulary was seen, (vocab_size,).

    Every objective's `reconstruction_loss` has this expectation where a model knows the tokens' frequencies and
    nothing else: a token is scored with probability t and weight 1 / t, or once in T_n steps with weight T_n. The
    estimate is corrected for few tokens (Miller 1955): frequencies in a sample look less even than they are.
    """
    total, seen = counts.sum(), counts[counts > 0]
    entropy = total.log() - (seen * seen.log()).sum() / total
    return (entropy + (len(seen) - 1) / (2 * total)).item()


def advice_on_learning(config, args, entropy: float, steps: range, reconstruction_loss: float) -> str | None:
    """What to say of the mean `reconstruction_loss` over `steps`; `None` where the model is better than frequencies.

    Args:
        config: Of the model.
        args: The `TrainingArguments`.
        entropy: As of `unigram_entropy`.
    """
    if reconstruction_loss < AT_UNIGRAM_ENTROPY * entropy:
        return None
    advice = f"lower learning_rate (now at most {args.learning_rate}) or raise warmup_steps"
    if config.position_embedding_type == "rotary" and config.backbone_config is None and not config.position_groups:
        advice += '; position_embedding_type="learned", since rotary positions alone do not tell one mask from another'
    return (
        f"nothing but the frequencies of tokens is learned so far: over steps {steps.start} to {steps.stop} the "
        f"reconstruction_loss is {reconstruction_loss:.3f} nats a token, and the entropy of single tokens is "
        f"{entropy:.3f}. If it stays so, try: {advice}"
    )


def advice_on_latent(config, steps: range, kl_per_latent: float, num_active_units: int) -> str | None:
    """What to say of the latent over `steps`, when the KL term has its full weight; `None` where it is in use."""
    if num_active_units:
        return None
    advice = [f"a longer kl_warmup_steps (now {config.kl_warmup_steps})"]
    if config.objective == "vmd":
        advice.append('a few-step objective ("per_sample" or "per_step")')
    if config.block_size is None:
        advice.append("block_size, blocks of a few tokens with a latent each")
    elif config.prior == "standard":
        advice.append('prior="learned"')
    return (
        f"the latent encodes nothing (posterior collapse): over steps {steps.start} to {steps.stop} 0 of "
        f"{config.latent_size} dimensions are active, and kl_per_latent is {kl_per_latent:.2g} nats. Try: "
        f"{', or '.join(advice)}; or latent_size=0, the same model for less"
    )
