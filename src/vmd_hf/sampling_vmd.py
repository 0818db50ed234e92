"""The sampler: one step of masked diffusion, from the logits of masked positions to the tokens that are revealed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .generation_configuration_vmd import VMDGenerationConfig
from .schedule_vmd import num_revealed

Generators = torch.Generator | list[torch.Generator] | None


# --- random numbers --------------------------------------------------------------------------------------------------


def check_generators(generator: Generators, num_rows: int) -> None:
    if isinstance(generator, list) and len(generator) != num_rows:
        raise ValueError(f"generator must hold one for each of {num_rows} rows, got {len(generator)}")


def generators_on(generator: Generators, device: torch.device) -> Generators:
    """Generators of `device`: those of another device (each advances by one draw) seed one there, so that noise over
    the vocabulary is made where it is used. Each row's still depends on its own generator alone."""
    if isinstance(generator, list):
        return [generators_on(row, device) for row in generator]
    if generator is None or generator.device.type == device.type:
        return generator
    try:
        on_device = torch.Generator(device)
    except (NotImplementedError, RuntimeError):
        return generator  # a device without generators of its own
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return on_device.manual_seed(int(seed))


def draw(
    sampler: Callable[..., torch.Tensor],
    counts: list[int],
    trailing: tuple[int, ...],
    generator: Generators,
    device: torch.device,
) -> torch.Tensor:
    """`sampler((sum(counts), *trailing))`, row by row of the batch where every row has a generator of its own.

    With a list, row i's numbers come from its generator alone, so they do not depend on the rest of the batch.
    """
    if not isinstance(generator, list):
        source = device if generator is None else generator.device
        return sampler((sum(counts), *trailing), generator=generator, device=source).to(device)
    parts = [
        sampler((count, *trailing), generator=row, device=row.device).to(device)
        for count, row in zip(counts, generator, strict=True)
    ]
    return torch.cat(parts)


def draw_for(
    used: torch.Tensor, sampler: Callable[..., torch.Tensor], trailing: tuple[int, ...], generator: Generators
) -> torch.Tensor:
    """`sampler((*used.shape, *trailing))` for `used` (batch, k) bool. With a generator for each row only what is used
    is drawn (1 elsewhere), so that a row's numbers depend on nothing but the row."""
    shape = (*used.shape, *trailing)
    if not isinstance(generator, list):
        source = used.device if generator is None else generator.device
        return sampler(shape, generator=generator, device=source).to(used.device)
    numbers = torch.ones(shape, device=used.device)
    numbers[used] = draw(sampler, used.sum(-1).tolist(), trailing, generator, used.device)
    return numbers


def exponential(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, device=device).exponential_(generator=generator)


# --- the pieces of a step --------------------------------------------------------------------------------------------


def warp(logits: torch.Tensor, config: VMDGenerationConfig) -> torch.Tensor:
    """Logits after temperature, top-k and top-p. (..., vocabulary) to the same."""
    shape, logits = logits.shape, logits.flatten(0, -2)  # transformers' top-p knows two dimensions only
    if config.temperature is not None:
        logits = TemperatureLogitsWarper(float(config.temperature))(None, logits)
    if config.top_k is not None:
        logits = TopKLogitsWarper(config.top_k)(None, logits)
    if config.top_p is not None:
        logits = TopPLogitsWarper(float(config.top_p))(None, logits)
    return logits.view(shape)


def confidence_of(logits: torch.Tensor, tokens: torch.Tensor, rule: str) -> torch.Tensor:
    """How confident the model is of each prediction: (...) float32.

    Args:
        logits: (..., vocabulary), of the distribution of each token.
        tokens: (...), the predicted tokens.
        rule: `"top_prob"`, `"top_prob_margin"` or `"entropy"`.
    """
    probabilities = logits.softmax(-1)
    if rule == "top_prob":
        return probabilities.gather(-1, tokens[..., None]).squeeze(-1)
    if rule == "top_prob_margin":
        best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return best - second
    return -torch.special.entr(probabilities).sum(-1)


def select_positions(confidence: torch.Tensor, masked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` (batch,) masked positions of highest confidence of each row; equal ones from left to right.

    Args:
        confidence: (batch, k) float.
        masked: (batch, k) bool.

    Returns:
        (batch, k) bool.
    """
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    return masked & (rank < count[:, None])


def corrector_probability(
    revealed: torch.Tensor,
    probability: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    num_maskable: torch.Tensor,
    config: VMDGenerationConfig,
) -> torch.Tensor:
    """sigma of ReMDM (arXiv 2503.00307, section 4): with which probability each revealed token is masked again.

    Args:
        revealed: (batch, length) bool, tokens that were filled in earlier steps.
        probability: (batch, length), what each of them had when it was revealed.
        before, after, num_maskable: (batch,), tokens revealed before and after the step by the schedule, and of all.

    Returns:
        (batch, length) float, 0 where nothing was revealed.
    """
    sigma_max = ((num_maskable - after) / before.clamp(min=1)).clamp(max=1)[:, None]
    if config.corrector == "cap":
        sigma = sigma_max.clamp(max=config.corrector_strength)
    else:
        sigma = config.corrector_strength * sigma_max
        if config.corrector == "confidence":
            sigma = sigma * (-probability).masked_fill(~revealed, -torch.inf).softmax(-1).nan_to_num()
    return torch.where(revealed, sigma, 0.0)


# --- a step ----------------------------------------------------------------------------------------------------------


@dataclass
class Candidates:
    """What a remasking rule of one's own sees at a step: the masked positions, as many columns k for each row.

    Attributes:
        rows: (batch, 1) int64, and
        columns: (batch, k) int64: where these positions are in the sequences, `history[-1][rows, columns]`.
        masked: (batch, k) bool; `False` where a row has fewer masked positions: what the rule says there is ignored.
        logits: (batch, k, vocabulary) float32, before temperature, top-k and top-p.
        tokens: (batch, k) int64, the tokens that were drawn (or the most probable ones, which those of a model with a
            chain or a causal head always are: its tokens are drawn where positions are chosen already).
        history: The sequences (batch, length), masks included, before the first step and after each one so far.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    history: Sequence[torch.Tensor]


RemaskingRule = Callable[[Candidates], torch.Tensor]  # to a confidence for each position, (batch, k) float


@dataclass
class SamplerState:
    """One block, or the whole sequence, of each row while it is filled. Rows that are done stay in the batch.

    Attributes:
        tokens: (batch, width) int64.
        masked: (batch, width) bool.
        fillable: (batch, width) bool, the positions that were masked at the start.
        num_fillable, num_steps: (batch,) int64, n and T_n.
        active: (batch,) bool, rows that are not done.
        probability: (batch, width) float32, what revealed tokens had when they were revealed.
        sequence_columns: (batch, width) int64, the columns in the row's sequence, and
        history: for a remasking rule of one's own, see [`Candidates`].
        columns: (batch, k) int64, the columns that logits are computed for: the masked ones first, and
        candidates: (batch, k) bool, which of these are masked, in rows that are not done. Both of `look_at_masked`.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    fillable: torch.Tensor
    num_fillable: torch.Tensor
    num_steps: torch.Tensor
    active: torch.Tensor
    probability: torch.Tensor
    sequence_columns: torch.Tensor | None = None
    history: Sequence[torch.Tensor] = ()
    columns: torch.Tensor | None = None
    candidates: torch.Tensor | None = None

    def num_revealed(self, step: int) -> torch.Tensor:
        """(batch,) int64: how many tokens the schedule has revealed after a step, from 1."""
        return num_revealed(step, self.num_fillable, self.num_steps)

    def look_at_masked(self, num_columns: int) -> None:
        """Picks the columns: the first `num_columns` masked ones of each row from left to right, and where a row has
        fewer, others. A number that is known without asking the device keeps the shapes of a step static."""
        self.columns = self.masked.long().argsort(dim=-1, descending=True, stable=True)[:, :num_columns]
        self.candidates = self.masked.gather(-1, self.columns) & self.active[:, None]

    def reveal(self, step: "SamplerStep", mask_token_id: int) -> None:
        tokens = torch.where(step.revealed, step.tokens, self.tokens.gather(-1, self.columns))
        self.tokens = self.tokens.scatter(-1, self.columns, tokens)
        masked = self.masked.gather(-1, self.columns) & ~step.revealed
        self.masked = self.masked.scatter(-1, self.columns, masked)
        if step.probability is not None:
            probability = torch.where(step.revealed, step.probability, self.probability.gather(-1, self.columns))
            self.probability = self.probability.scatter(-1, self.columns, probability)
        if step.remasked is not None:
            self.tokens = self.tokens.masked_fill(step.remasked, mask_token_id)
            self.masked = self.masked | step.remasked


@dataclass
class SamplerStep:
    """What a step does to the columns that were looked at.

    Attributes:
        tokens: (batch, k) int64, predicted.
        revealed: (batch, k) bool, which of them are revealed now.
        confidence: (batch, k) float32 under the remasking rule, -inf where there is nothing to reveal.
        probability: (batch, k) float32, that of the tokens, if anybody asks.
        remasked: (batch, width) bool, tokens that a corrector masks again.
    """

    tokens: torch.Tensor
    revealed: torch.Tensor
    confidence: torch.Tensor
    probability: torch.Tensor | None = None
    remasked: torch.Tensor | None = None


class Sampler:
    """One step, `logits, state, step -> tokens, revealed, confidence`: draws tokens, asks the remasking rule for their
    confidence, and selects as many of the most confident ones as the schedule (or the threshold) says.

    Tokens are drawn independently of one another from the logits that are given, unless the call says how those that
    are revealed together are drawn.

    Args:
        config: Settings of `generate`.
        rule: In place of `config.remasking`.
        generator: On the device of the logits; one for the batch, or one for each row.
    """

    def __init__(
        self, config: VMDGenerationConfig, rule: RemaskingRule | None = None, generator: Generators = None
    ) -> None:
        self.config = config
        self.rule = rule
        self.generator = generator

    def needs_logits(self) -> bool:
        """Whether which positions are revealed, or anybody, depends on what is predicted."""
        asked = self.config.output_confidences or self.config.corrector == "confidence"
        return asked or self.rule is not None or self.config.remasking not in ("random", "left_to_right")

    def __call__(
        self,
        logits: torch.Tensor | None,
        state: SamplerState,
        step: int,
        draw_together: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> SamplerStep:
        """
        Args:
            logits: (batch, k, vocabulary) float32 at `state.columns`, of p(x^i | x_t); `None` with `draw_together`
                where they are not needed.
            step: From 1.
            draw_together: Given which columns are revealed (batch, k), tokens of their joint distribution, (batch, k).
                Positions are then chosen before tokens: confidence is that of the most probable ones.
        """
        if draw_together is None:
            tokens = self.draw_tokens(logits, state)
        else:
            tokens = state.columns if logits is None else logits.argmax(-1)  # (of the former only the shape is read)
        confidence = self.confidence(logits, tokens, state).masked_fill(~state.candidates, -torch.inf)
        count, remasked = self.num_to_reveal(confidence, state, step)
        revealed = select_positions(confidence, state.candidates, count)
        if draw_together is not None:
            tokens = draw_together(revealed)
        probability = None
        if self.config.corrector == "confidence" or self.config.output_confidences:
            known = draw_together is None and self.rule is None and self.config.remasking == "top_prob"
            probability = confidence if known else confidence_of(logits, tokens, "top_prob")
        return SamplerStep(tokens, revealed, confidence, probability, remasked)

    def draw_tokens(self, logits: torch.Tensor, state: SamplerState) -> torch.Tensor:
        """(batch, k) int64."""
        if not self.config.do_sample:
            return logits.argmax(-1)
        # The largest of probabilities over independent exponentials falls on a token with its probability.
        race = draw_for(state.candidates, exponential, logits.shape[-1:], self.generator)
        return (warp(logits, self.config).softmax(-1) / race).argmax(-1)

    def confidence(self, logits: torch.Tensor, tokens: torch.Tensor, state: SamplerState) -> torch.Tensor:
        """(batch, k) float32; arbitrary where nothing is masked."""
        if self.rule is not None:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None]
            columns = state.sequence_columns.gather(-1, state.columns)
            confidence = self.rule(Candidates(rows, columns, state.candidates, logits, tokens, state.history))
            if confidence.shape != tokens.shape:
                raise ValueError(
                    f"remasking must return a confidence for each position, of shape {tuple(tokens.shape)}, got "
                    f"{tuple(confidence.shape)}"
                )
            return confidence.float()
        if self.config.remasking == "random":
            return draw_for(state.candidates, torch.rand, (), self.generator)
        if self.config.remasking == "left_to_right":
            return -state.columns.float()
        return confidence_of(logits, tokens, self.config.remasking)

    def num_to_reveal(
        self, confidence: torch.Tensor, state: SamplerState, step: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch,) int64, and with a corrector the tokens that it masks again, (batch, width) bool."""
        after = state.num_revealed(step)
        filled = state.fillable & ~state.masked
        count, remasked = after - filled.sum(-1), None
        if self.config.corrector is not None:
            before = state.num_revealed(step - 1)
            sigma = corrector_probability(filled, state.probability, before, after, state.num_fillable, self.config)
            may_be_remasked = state.fillable & state.active[:, None]
            remasked = (draw_for(may_be_remasked, torch.rand, (), self.generator) < sigma) & may_be_remasked
            count = count + remasked.sum(-1)
        if self.config.confidence_threshold is not None:
            count = count.maximum((confidence > self.config.confidence_threshold).sum(-1)).clamp(min=1)
        return count, remasked


__all__ = ["Candidates", "RemaskingRule", "Sampler", "SamplerState", "SamplerStep"]
