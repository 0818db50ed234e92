"""`generate` for masked diffusion with a latent (arXiv 2510.23606, algorithm 2): the canvas, the clean context and
its cache, and the loop over blocks and steps. What happens in a step is in sampling_vmd."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .blocks_vmd import CleanContext, Layout
from .canvas_vmd import Canvas, ContextReader, EndOfText, PrefixStreamer, Rounds, check_length, prepare_canvas
from .chain_vmd import NUM_TOKENS
from .generation_configuration_vmd import VMDGenerationConfig
from .sampling_vmd import (
    Generators,
    RemaskingRule,
    Sampler,
    SamplerState,
    check_generators,
    draw_for,
    exponential,
    generators_on,
)
from .schedule_vmd import most_revealed


@dataclass
class VMDGenerateOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate=True`.

    Attributes:
        sequences: (batch, length) int64.
        num_forward_passes: (batch,) int64, counted.
        latents: (batch, latent_size) float32 or None; with `resample_latents` those of each row's last step. With
            blocks (batch, generated blocks, latent_size), 0 for blocks that a row did not generate. Of a chain the
            state behind each token that the next token of its step was drawn from, (batch, length) or (batch,
            generated blocks, block_size) int64, 0 elsewhere.
        history: With `output_history`, the sequences after every step, a tuple of (batch, length).
        confidences: With `output_confidences`, (batch, length) float32: the probability of each token given what was
            there when it was revealed (before temperature, top-k and top-p); 1 for what was given, 0 for masks that
            are left.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None
    confidences: torch.Tensor | None = None


@dataclass
class GenerationState:
    """What one call of `generate` carries along."""

    config: VMDGenerationConfig
    canvas: Canvas
    sampler: Sampler
    host_rounds: Rounds  # what is known without asking the device
    rounds: Rounds
    reader: ContextReader | None
    latents: torch.Tensor | None  # (batch, rounds, latent_size)
    given_latents: bool
    num_forward_passes: torch.Tensor
    stopped: torch.Tensor
    confidences: torch.Tensor  # (batch, N * width)
    end_of_text: EndOfText | None
    logits_processor: LogitsProcessorList | None
    stopping_criteria: StoppingCriteriaList | None
    streamer: PrefixStreamer | None
    history: list[torch.Tensor] | None  # from before the first step on
    context: CleanContext | None = None  # of whole sequences: what their steps share

    def is_watched(self) -> bool:
        """Whether anybody looks at the canvas before a block is filled."""
        watchers = self.history, self.logits_processor, self.stopping_criteria, self.streamer
        return any(watcher is not None for watcher in watchers)

    def sequences(self) -> torch.Tensor:
        """(batch, length) in the rows' own columns, with everything after an end-of-sequence token padded."""
        return self.finish(self.canvas.sequences())

    def finish(self, sequences: torch.Tensor) -> torch.Tensor:
        return sequences if self.end_of_text is None else self.end_of_text.pad_after(sequences)


def execution_device(model, input_ids: torch.Tensor) -> torch.device:
    """The model's device. Where accelerate keeps weights on another one (offloading, `device_map`), it is that of the
    hook of the embeddings, and otherwise that of the inputs."""
    device = getattr(getattr(model.get_input_embeddings(), "_hf_hook", None), "execution_device", None)
    device = model.device if device is None else torch.device(device)
    return input_ids.device if device.type == "meta" else device


def ordinary(values: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Copies of tensors that were made in inference mode."""
    return tuple(map(ordinary, values)) if isinstance(values, tuple) else values.clone()


class VMDGenerationMixin:
    """`generate` for [`VMDForMaskedDiffusion`]."""

    output_modalities = ("text",)

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained`: takes the given generation config, or loads the saved one. (`kwargs` are fields
        of the model's config.)"""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
            return
        if pretrained_model_name_or_path is None:
            return  # weights were given, so there is no file
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
            )
        except OSError:
            pass  # a checkpoint without the file keeps the defaults of its model config

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Read by PEFT's causal language model wrapper; `generate` does not need it."""
        return {"input_ids": input_ids, **kwargs}

    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: VMDGenerationConfig | None = None,
        *,
        remasking: str | RemaskingRule | None = None,
        latents: torch.Tensor | None = None,
        generator: Generators = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: Any = None,
        token_type_ids: Any = None,
        **kwargs,
    ) -> torch.LongTensor | VMDGenerateOutput:
        """Fills every mask token of `input_ids`; with `max_new_tokens`, appends that many masks first.

        With blocks, they are filled from left to right: a block sees its own given tokens and everything in the blocks
        before it, but nothing after it. Given tokens in later blocks do not influence a gap before them; a model
        without blocks (`block_size=None`) fills gaps from both sides.

        Tokens that are given never change. Each step runs the model once, predicts the masked positions and keeps as
        many as the schedule says: after step k of its T_n steps a row (or block) of n masks has floor(k n / T_n) of
        them filled. Rows that are done stay in the batch, unchanged and uncounted. The host waits for the device once
        a block at most, but once a step where the number of steps depends on what is predicted
        (`confidence_threshold`, `stopping_criteria`), or a generator for each row, a logits processor or a streamer
        is given.

        Inputs may be on any device: they are moved to the model's, on which all outputs are.

        Args:
            input_ids: (batch, length) int64; some are the mask token.
            attention_mask: (batch, length), 0 for padding on either side; padding is never filled.
            generation_config: Replaces the model's own.
            remasking: A rule of [`VMDGenerationConfig`] by its name, or one of one's own: called at each step with
                [`Candidates`] (rows, columns, logits, history, ...), it returns a confidence for each position,
                (batch, k) float. The most confident positions are revealed (with `confidence_threshold` all that
                exceed it). For example, first those whose left neighbour is known:

                    def beside_known(candidates):
                        known = candidates.history[-1] != model.config.mask_token_id
                        return known[candidates.rows, (candidates.columns - 1).clamp(min=0)].float()
            latents: (batch, latent_size) float, instead of a draw from N(0, I). They are kept for all steps. With
                blocks (batch, generated blocks, latent_size), for the blocks in which there is something to fill. Of
                a chain, states, int64: (batch, length) or (batch, generated blocks, block_size).
            generator: One for the batch, or a list of one for each row: then what a row gets does not depend on the
                rest of the batch. One of another device than the model's (a CPU generator for an accelerator) seeds
                one there.
            logits_processor: Called with `(sequences, scores)`, one row for each masked position: (positions, length)
                and (positions, vocabulary).
            stopping_criteria: Called after each step with the sequences (batch, length), masks included; a row for
                which it says so is left as it is.
            streamer: Gets the prefix of the sequence as it becomes final, the given prefix first. If it has a method
                `put_draft`, that gets the sequences (batch, length) after every step, masks included.
            token_type_ids: Ignored, so that `generate(**tokenizer(...))` works with tokenizers that return them.
            kwargs: Any field of [`VMDGenerationConfig`], which it overrides for this call.

        Returns:
            (batch, length) int64, or [`VMDGenerateOutput`] with `return_dict_in_generate=True`. With
            `max_new_tokens` the prompts end in one column, padded on the left.

        Raises:
            ValueError: for wrong shapes, unknown or contradicting settings.
        """
        config, rule = self._generation_settings(generation_config, remasking, kwargs)
        self._check_generation_inputs(input_ids, attention_mask, latents, generator, config)
        with torch.inference_mode():
            output = self._generate(
                config,
                rule,
                input_ids,
                attention_mask,
                latents,
                generator,
                logits_processor,
                stopping_criteria,
                streamer,
            )
        # Copies made out here are tensors for any use, in a training step, too.
        output = VMDGenerateOutput(**{name: ordinary(value) for name, value in output.items()})
        return output if config.return_dict_in_generate else output.sequences

    def _generate(
        self,
        config: VMDGenerationConfig,
        rule: RemaskingRule | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        latents: torch.Tensor | None,
        generator: Generators,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList | None,
        streamer: Any,
    ) -> VMDGenerateOutput:
        """`generate`, of arguments that are checked."""
        device = execution_device(self, input_ids)
        input_ids = input_ids.to(device).long()
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
        sequences, attention_mask = prepare_canvas(
            input_ids, attention_mask, config.max_new_tokens, self.config.mask_token_id
        )
        real = attention_mask != 0
        lengths = real.sum(-1).cpu()
        check_length(lengths, self.config)
        padded = bool((lengths < real.shape[1]).any())
        layout = self.model.lay_out(sequences, attention_mask if padded else None)
        canvas = Canvas.create(sequences, real, layout, self.config.mask_token_id)
        host_rounds = Rounds.plan(canvas.num_masked().cpu(), config)
        with_blocks = self.config.block_size is not None
        has_end = config.eos_token_id is not None and config.max_new_tokens is not None
        state = GenerationState(
            config=config,
            canvas=canvas,
            sampler=Sampler(config, rule, generators_on(generator, device)),
            host_rounds=host_rounds,
            rounds=Rounds(*(part.to(device) for part in host_rounds)),
            reader=ContextReader(canvas, host_rounds, config) if with_blocks else None,
            latents=self._round_latents(latents, host_rounds, layout.width, device),
            given_latents=latents is not None,
            num_forward_passes=torch.zeros_like(lengths, device=device),
            stopped=torch.zeros_like(lengths, device=device, dtype=torch.bool),
            confidences=(~canvas.masked).float(),
            end_of_text=EndOfText(config, device) if has_end else None,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=None if streamer is None else PrefixStreamer(streamer),
            history=[sequences] if config.output_history or rule is not None else None,
        )
        if streamer is not None:
            state.streamer.put(sequences, canvas.open_columns())
        may_stop = has_end or stopping_criteria is not None
        for index in range(host_rounds.block.shape[1]):
            working = (state.rounds.num_masked[:, index] > 0) & ~state.stopped
            if may_stop and not working.any():
                break
            self._fill_blocks(state, index, working, host_rounds.most_masked(index, config))

        sequences = state.sequences()
        if streamer is not None:
            state.streamer.put(sequences, torch.zeros_like(real))  # a stopped row's rest
            streamer.end()
        return VMDGenerateOutput(
            sequences=sequences,
            num_forward_passes=state.num_forward_passes,
            latents=state.latents if state.latents is None or with_blocks else state.latents[:, 0],
            history=tuple(map(state.finish, state.history[1:])) if config.output_history else None,
            confidences=canvas.in_rows(state.confidences, 1.0) if config.output_confidences else None,
        )

    def _fill_blocks(self, state: GenerationState, index: int, working: torch.Tensor, most_masked: list[int]) -> None:
        """Fills one block (or the whole sequence) of each row in `working` (batch,), those of the round `index`.
        `most_masked`: for each step, how many masks a row has left before it at most."""
        config, canvas = state.config, state.canvas
        block, num_masked, num_steps = (part[:, index] for part in state.rounds)
        columns, window = canvas.columns(block, 1), canvas.window(block)
        masked = canvas.masked.gather(-1, columns)
        work = SamplerState(
            tokens=canvas.tokens.gather(-1, columns),
            masked=masked,
            fillable=masked & working[:, None],
            num_fillable=num_masked,
            num_steps=num_steps,
            active=working,
            probability=torch.zeros_like(masked, dtype=torch.float),
        )
        if state.sampler.rule is not None:
            work.sequence_columns, work.history = canvas.own_columns().gather(-1, columns), state.history
        given = None
        if config.guidance_scale is not None:
            given = canvas.given.gather(-1, columns)
            window = window.select(torch.arange(len(block), device=block.device).repeat(2))
        if state.reader is not None:
            state.reader.start(index, block)
        else:
            state.context = CleanContext()
        prior = self._read_prior(state, index, working)
        conditioning = None
        wait = config.confidence_threshold is not None or state.stopping_criteria is not None
        in_turn = self.chain is not None or self.causal_head is not None
        host_most_revealed = state.host_rounds.most_revealed(index) if in_turn else []
        for step, most in enumerate(most_masked, start=1):
            work.active = working & ~state.stopped & work.masked.any(-1)
            if wait:
                most = int((work.masked & work.active[:, None]).sum(-1).max())
                if most == 0:
                    break
            work.look_at_masked(most)
            if self.config.gaussian_size and (step == 1 or config.resample_latents):
                if not state.given_latents:
                    state.latents[:, index] = self._draw_latents(state, work.active, prior, state.latents[:, index])
                conditioning = self.model.condition(state.latents[:, index, None])
            hidden_states = self._hidden_states(
                state, work, window, given, self._conditioning(state, work, step, conditioning)
            )
            draw_together, logits = None, None
            if in_turn:
                most_revealed = None if wait else most if config.corrector else host_most_revealed[step - 1]
                draw_together = partial(self._draw_in_turn, state, index, work, hidden_states, most_revealed)
            if not in_turn or state.sampler.needs_logits():
                logits = self._predict(state, work, hidden_states)
            step_done = state.sampler(logits, work, step, draw_together)
            work.reveal(step_done, self.config.mask_token_id)
            if state.is_watched():
                canvas.put(columns, work.tokens, work.masked)
            self._after_step(state, work.active)
        canvas.put(columns, work.tokens, work.masked)
        if config.output_confidences:
            confidences = torch.where(
                work.fillable & ~work.masked, work.probability, state.confidences.gather(-1, columns)
            )
            state.confidences = state.confidences.scatter(-1, columns, confidences)
        self._after_blocks(state)

    def _after_step(self, state: GenerationState, active: torch.Tensor) -> None:
        """Counts, and shows the sequences to whoever wants them."""
        state.num_forward_passes += active
        if state.history is not None:
            state.history.append(state.canvas.sequences())
        if state.stopping_criteria is not None:
            state.stopped |= state.stopping_criteria(state.canvas.sequences(), None)
        if state.streamer is not None:
            sequences = state.sequences()
            state.streamer.draft(sequences)
            if state.config.corrector is None:  # with one, nothing is final before its block is
                state.streamer.put(sequences, state.canvas.open_columns())

    def _after_blocks(self, state: GenerationState) -> None:
        """Rows with an end-of-sequence token are finished; what is final is streamed."""
        if state.end_of_text is not None:
            state.stopped |= state.end_of_text.ends(state.canvas.sequences()).any(-1)
        if state.streamer is not None:
            state.streamer.put(state.sequences(), state.canvas.open_columns())

    def _hidden_states(
        self,
        state: GenerationState,
        work: SamplerState,
        window: Layout,
        given: torch.Tensor | None,
        conditioning: torch.Tensor | None,
    ) -> torch.Tensor:
        """One forward pass over the blocks: (batch, width, hidden_size), with guidance extrapolated."""
        inputs, scale = work.tokens, state.config.guidance_scale
        if scale is not None:
            inputs = torch.cat([inputs, inputs.masked_fill(given, self.config.mask_token_id)])
            conditioning = None if conditioning is None else torch.cat([conditioning, conditioning])
        context = state.context if state.reader is None else state.reader.context
        outputs = self.model(inputs, layout=window, conditioning=conditioning, context=context, return_dict=True)
        if state.reader is not None:
            state.reader.keep(outputs)
        if scale is None:
            return outputs.last_hidden_state
        guided, unguided = outputs.last_hidden_state.chunk(2)
        return unguided + scale * (guided - unguided)

    def _predict(self, state: GenerationState, work: SamplerState, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (batch, k, vocabulary) float32 at the columns that the sampler looks at."""
        columns = work.columns[..., None].expand(-1, -1, hidden_states.shape[-1])
        return self._process(state, work.candidates, self.compute_logits(hidden_states.gather(1, columns)).float())

    def _process(self, state: GenerationState, candidates: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits (batch, k, vocabulary) as a logits processor, which sees the candidates (batch, k) only, has them."""
        if state.logits_processor is not None:
            rows, _ = candidates.nonzero(as_tuple=True)
            logits[candidates] = state.logits_processor(state.canvas.sequences()[rows], logits[candidates])
        return logits

    def _draw_in_turn(
        self,
        state: GenerationState,
        index: int,
        work: SamplerState,
        hidden_states: torch.Tensor,
        most_revealed: int | None,
        revealed: torch.Tensor,
    ) -> torch.Tensor:
        """By a chain or a causal head: tokens (batch, k) int64 of which the revealed ones are drawn from left to
        right, each given those before it. `most_revealed`: how many a row can have; `None`: the device is asked."""
        order = revealed.long().argsort(dim=-1, descending=True, stable=True)
        columns, count = work.columns.gather(-1, order), revealed.sum(-1, keepdim=True)
        hidden_states = hidden_states.gather(1, columns[..., None].expand(-1, -1, hidden_states.shape[-1]))
        drawn, memory = torch.zeros_like(columns), None
        if self.chain is not None:
            tables = self.chain.tables()
            gaps = columns.diff(dim=-1).clamp(min=1)
            surroundings = self.chain.surroundings(hidden_states[:, :-1], hidden_states[:, 1:], gaps, tables)
            nearest = [torch.zeros_like(hidden_states[:, 0])] * NUM_TOKENS
        for place in range(int(count.max()) if most_revealed is None else most_revealed):
            of_place, after, tilts = replace(work, candidates=count > place), hidden_states[:, place], None
            if place:
                embeddings, before = self.get_input_embeddings()(drawn[:, place - 1]), hidden_states[:, place - 1]
            if place and self.chain is None:
                after, memory = self.causal_head.read(embeddings[:, None], before[:, None], after[:, None], memory)
                after = after[:, 0]
            elif place:
                nearest = [self.chain.known(embeddings), *nearest[:-1]]
                if state.given_latents:
                    memory = state.latents[:, index].gather(-1, columns[:, place - 1, None])[:, 0]
                else:
                    scores, weights = self.chain.remember(nearest[0], before)
                    following = scores if memory is None else self.chain.following(scores, weights, memory, tables)
                    memory = self._draw_states(state, index, of_place, columns[:, place - 1, None], following)
                after, tilts = self.chain.read(torch.cat(nearest, dim=-1), surroundings[:, place - 1], after)
            logits = self._process(state, of_place.candidates, self.compute_logits(after)[:, None].float())
            if tilts is not None:
                logits = self.chain.token_log_probs(tilts, logits[:, 0], memory, tables)[:, None]
            drawn[:, place, None] = state.sampler.draw_tokens(logits, of_place)
        return torch.zeros_like(drawn).scatter(-1, order, drawn)

    def _draw_states(
        self,
        state: GenerationState,
        index: int,
        work: SamplerState,
        columns: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """States (batch,) int64 of a chain's tokens at these columns (batch, 1), drawn from the softmax of `scores`
        (batch, K), and noted where another token of the step follows."""
        if state.config.latent_scale:
            noise = draw_for(work.candidates, exponential, scores.shape[-1:], state.sampler.generator)
            scores = scores - noise[:, 0].log()  # the largest falls on a state with its probability
        states, noted = scores.argmax(-1, keepdim=True), state.latents[:, index]
        states = torch.where(work.candidates, states, noted.gather(-1, columns))
        state.latents[:, index] = noted.scatter(-1, columns, states)
        return states[:, 0]

    def _conditioning(
        self, state: GenerationState, work: SamplerState, step: int, conditioning: torch.Tensor | None
    ) -> torch.Tensor | None:
        """That of the blocks which reveal enough tokens in this step to have a latent."""
        if conditioning is None or self.config.latent_min_tokens == 1:
            return conditioning
        at_most = work.num_revealed(step) - work.num_revealed(step - 1)
        if state.config.confidence_threshold is not None:
            at_most = work.masked.sum(-1)
        return self.model.for_steps(conditioning, at_most[:, None])

    def _round_latents(self, latents, rounds: Rounds, width: int, device: torch.device) -> torch.Tensor | None:
        """(batch, rounds, latent_size), or the states of a chain, (batch, rounds, width) int64: the given ones, or
        room for those to be drawn."""
        if self.config.latent_size == 0:
            return None
        of_chain = self.chain is not None
        batch, num_rounds = rounds.block.shape
        shape = (batch, num_rounds, width if of_chain else self.config.latent_size)
        if self.config.block_size is None:
            shape = (batch, 1, shape[2])
        if latents is None:
            return torch.zeros(shape, device=device, dtype=torch.long if of_chain else torch.float)
        if self.config.block_size is None:
            latents = latents[:, None]
        if latents.shape != shape:
            names = "block_size" if of_chain else "latent_size"
            raise ValueError(
                f"latents must have shape (batch, generated blocks, {names}) = {shape}, got {tuple(latents.shape)}"
            )
        return latents.to(device, copy=True)

    def _read_prior(
        self, state: GenerationState, index: int, working: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A pass over the clean tokens before the blocks: mean and log-variance of p(z | these tokens), each (batch,
        latent_size); `None` for a prior of N(0, I), or where no block has a latent to be drawn."""
        if self.model.latent_prior is None or state.given_latents:
            return None
        most = state.host_rounds.num_masked[:, index]
        if state.config.confidence_threshold is None:
            most = most_revealed(most, state.host_rounds.num_steps[:, index])
        if most.max() < self.config.latent_min_tokens:
            return None
        context, block = state.reader.context, state.rounds.block[:, index]
        before = torch.zeros(len(block), self.config.hidden_size, device=block.device, dtype=self.dtype)
        if context.input_ids is not None:
            width = state.canvas.layout.width
            first = context.new.block[:, :1] // width
            new = Layout(
                num_blocks=context.input_ids.shape[1] // width,
                width=width,
                position_ids=context.position_ids,
                real=None,
                document=context.new.document,
                first_block=first,
            )
            hidden_states, read = self.model.read(context.input_ids, new, context.without_new())
            state.reader.keep(read)
            last = (block - first[: len(block), 0]) * width - 1  # -1: nothing before the block
            state.num_forward_passes += working & (last >= 0)
            rows = torch.arange(len(block), device=block.device)
            before = hidden_states[rows, last] * (last >= 0)[:, None]
        return self.model.latent_prior(before)

    def _draw_latents(self, state: GenerationState, active, prior, latents) -> torch.Tensor:
        """(batch, latent_size): fresh ones for the rows in `active`, those of the others as they are."""
        noise = draw_for(active[:, None], torch.randn, latents.shape[-1:], state.sampler.generator)[:, 0]
        drawn = state.config.latent_scale * noise
        if prior is not None:
            mean, log_variance = prior
            drawn = mean + (0.5 * log_variance).exp() * drawn
        return torch.where(active[:, None], drawn, latents)

    def _generation_settings(
        self, generation_config, remasking, kwargs
    ) -> tuple[VMDGenerationConfig, RemaskingRule | None]:
        if generation_config is None:
            config = copy.deepcopy(self.generation_config)
        elif isinstance(generation_config, VMDGenerationConfig):
            config = copy.deepcopy(generation_config)
            special_tokens = {name: getattr(self.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
            config.update(defaults_only=True, **special_tokens)
        else:
            raise ValueError(
                f"generation_config must be a VMDGenerationConfig, got {type(generation_config).__name__}"
            )
        if unknown := kwargs.keys() - vars(config).keys():
            raise ValueError(f"generate knows no argument {', '.join(map(repr, sorted(unknown)))}")
        if remasking is not None and not callable(remasking):
            kwargs["remasking"] = remasking
        config.update(**kwargs)
        return config, remasking if callable(remasking) else None

    def _check_generation_inputs(self, input_ids, attention_mask, latents, generator, config):
        if self.config.mask_token_id is None:
            raise ValueError("mask_token_id must be set in the config to generate, got None")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
        if input_ids.shape[0] == 0 or not (input_ids.shape[1] or config.max_new_tokens):
            raise ValueError(
                "input_ids must have at least one row, and one column unless max_new_tokens is given, got shape "
                f"{tuple(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        check_generators(generator, input_ids.shape[0])
        if self.chain is not None and config.latent_scale not in (0, 1):
            raise ValueError(
                "latent_scale must be 1 (states that are drawn) or 0 (the most probable ones) for a chain, got "
                f"{config.latent_scale}"
            )
        if latents is None:
            return
        if self.config.latent_size == 0:
            raise ValueError("latents must be None for a model with latent_size = 0")
        if config.resample_latents:
            raise ValueError("latents must be None with resample_latents=True, which draws them at every step")
        rows, size, name = input_ids.shape[0], self.config.latent_size, "latent_size"
        if self.chain is not None:
            size, name = input_ids.shape[1] + (config.max_new_tokens or 0), "length"
            states = torch.arange(self.config.latent_size, device=latents.device)
            if latents.is_floating_point() or not torch.isin(latents, states).all():
                raise ValueError(
                    f"latents must be states of the chain, integers from 0 to {self.config.latent_size - 1}, got "
                    f"others ({latents.dtype})"
                )
        if self.config.block_size is None and latents.shape != (rows, size):
            raise ValueError(f"latents must have shape (batch, {name}) = {(rows, size)}, got {tuple(latents.shape)}")


__all__ = ["VMDGenerateOutput", "VMDGenerationConfig", "VMDGenerationMixin"]
