"""Settings of `generate`."""

from transformers.generation import GenerationConfig

REMASKING_RULES = ("random", "top_prob", "top_prob_margin", "entropy", "left_to_right")
CORRECTORS = (None, "cap", "rescale", "confidence")
CACHES = ("dynamic", "static")


class VMDGenerationConfig(GenerationConfig):
    """Settings of `generate`, saved with the model in generation_config.json.

    Args:
        max_new_tokens: Mask tokens appended to the prompt before filling; `None`: fill the masks that are there.
        num_steps: Forward passes in which a row, or with blocks each block of it, is filled; with fewer masks than
            that it takes fewer. `None`: one token a step.
        remasking: Which predictions are kept at each step: `"random"` positions, those with the highest probability
            (`"top_prob"`), the widest margin between the two most probable tokens (`"top_prob_margin"`, arXiv
            2502.06768) or the lowest entropy (`"entropy"`), or the leftmost (`"left_to_right"`). For a rule of one's
            own see `generate`.
        do_sample: `False`: the most probable token (the paper's algorithm). `True`: a draw from the distribution.
        temperature, top_k, top_p: Change the distribution that tokens are drawn from, with `do_sample` only. The
            confidence of the remasking rules is that of the unchanged distribution.
        confidence_threshold: In (0, 1). Reveals every token whose confidence under `remasking` (`"top_prob"` or
            `"top_prob_margin"`) exceeds it, and at least one: as many steps as it takes, `num_steps` at most.
        resample_latents: Draw a latent for each step (per-step latent) instead of one for all steps (shared latent).
            `True` is the sampler that belongs to `objective="per_step"` (whose models default to it) and to `"vmd"`;
            `False`, the paper's, to `"per_sample"`.
        latent_scale: Factor on drawn latents: below 1 for more typical samples. 1 samples the model. For a chain, 1 or
            0: the most probable state behind each token.
        corrector: Mask revealed tokens again at each step, so that they can be corrected (ReMDM, arXiv 2503.00307,
            section 4). With alpha and alpha' the shares of tokens revealed before and after the step, the probability
            is at most sigma_max = min(1, (1 - alpha') / alpha): `"cap"`: min(corrector_strength, sigma_max);
            `"rescale"`: corrector_strength * sigma_max; `"confidence"`: that times the softmax over the row's
            revealed tokens of minus the probability that they had when they were revealed. Given tokens stay. With a
            corrector, a row takes `num_steps` steps even where it has fewer masks. Off by default.
        corrector_strength: eta of that paper, in (0, 1].
        guidance_scale: Classifier-free guidance on the given tokens: hidden states are extrapolated from those
            without the prompt, `without + guidance_scale * (with - without)`, which the linear output layer turns
            into the same for logits. Without the prompt: its tokens are masks (in earlier blocks: not there). One
            pass of twice as many rows. `None` and 1 are no guidance.
        use_cache: Keep keys and values of finished blocks; no effect on whole sequences.
        cache_implementation: `"dynamic"` (attention reads what is filled) or `"static"` (always the whole cache, so
            that the shapes of all steps are the same).
        return_dict_in_generate: Return a [`VMDGenerateOutput`] instead of the sequences alone.
        output_history: Put the sequences after every step into that output.
        output_confidences: Put the probability that each token had when it was revealed into that output.
        bos_token_id, eos_token_id, pad_token_id: Special tokens. What follows the first end-of-sequence token among
            new tokens becomes padding.

    Raises:
        ValueError: for a value out of range, a contradiction, or an unknown name.
    """

    def __init__(self, **kwargs):
        # The parent's __init__ is left out on purpose: its fields belong to autoregressive sampling.
        self.max_new_tokens: int | None = kwargs.pop("max_new_tokens", None)
        self.num_steps: int | None = kwargs.pop("num_steps", None)
        self.remasking: str = kwargs.pop("remasking", "top_prob")
        self.do_sample: bool = kwargs.pop("do_sample", False)
        self.temperature: float | None = kwargs.pop("temperature", None)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.resample_latents: bool = kwargs.pop("resample_latents", False)
        self.latent_scale: float = kwargs.pop("latent_scale", 1.0)
        self.corrector: str | None = kwargs.pop("corrector", None)
        self.corrector_strength: float = kwargs.pop("corrector_strength", 0.1)
        self.guidance_scale: float | None = kwargs.pop("guidance_scale", None)
        self.use_cache: bool = kwargs.pop("use_cache", True)
        self.cache_implementation: str = kwargs.pop("cache_implementation", "dynamic")
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self.output_history: bool = kwargs.pop("output_history", False)
        self.output_confidences: bool = kwargs.pop("output_confidences", False)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)

        self._from_model_config: bool | None = kwargs.pop("_from_model_config", None)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        kwargs.pop("_commit_hash", None)
        if kwargs:
            raise ValueError(f"VMDGenerationConfig knows no argument {', '.join(map(repr, sorted(kwargs)))}")
        self.validate()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Raises ValueError at the first broken rule; `strict` and `user_set_attributes` are the parent's."""
        for name in ("max_new_tokens", "num_steps", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")
        if self.remasking not in REMASKING_RULES:
            raise ValueError(f"remasking must be one of {REMASKING_RULES}, got {self.remasking!r}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0 (do_sample=False is greedy), got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        for name in ("temperature", "top_k", "top_p"):
            if not self.do_sample and getattr(self, name) is not None:
                raise ValueError(f"{name} needs do_sample=True, got {name}={getattr(self, name)} without it")
        if self.confidence_threshold is not None:
            if not 0 < self.confidence_threshold < 1:
                raise ValueError(f"confidence_threshold must lie in (0, 1), got {self.confidence_threshold}")
            if self.remasking not in ("top_prob", "top_prob_margin"):
                raise ValueError(
                    "confidence_threshold needs remasking='top_prob' or 'top_prob_margin', got "
                    f"remasking={self.remasking!r}"
                )
        if self.latent_scale < 0:
            raise ValueError(f"latent_scale must not be negative, got {self.latent_scale}")
        if self.corrector not in CORRECTORS:
            raise ValueError(f"corrector must be one of {CORRECTORS}, got {self.corrector!r}")
        if not 0 < self.corrector_strength <= 1:
            raise ValueError(f"corrector_strength must lie in (0, 1], got {self.corrector_strength}")
        if self.corrector is not None and self.confidence_threshold is not None:
            raise ValueError(
                "corrector must be None with confidence_threshold, which leaves no schedule to correct in, got "
                f"{self.corrector!r}"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must be None or not negative, got {self.guidance_scale}")
        if self.cache_implementation not in CACHES:
            raise ValueError(f"cache_implementation must be one of {CACHES}, got {self.cache_implementation!r}")
        for name in ("output_history", "output_confidences"):
            if getattr(self, name) and not self.return_dict_in_generate:
                raise ValueError(f"{name} needs return_dict_in_generate=True, got False")

    @classmethod
    def from_model_config(cls, model_config) -> "VMDGenerationConfig":
        """The defaults of a model: its special tokens, and the sampler that belongs to its objective (from left to
        right if some of the training was for that)."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        return cls(
            eos_token_id=values.get("eos_token_id"),
            pad_token_id=values.get("pad_token_id"),
            resample_latents=values.get("objective") == "per_step"
            and values.get("latent_size", 0) > 0
            and values.get("latent_type") != "chain",  # whose states belong to a step anyway
            remasking="left_to_right" if values.get("left_to_right") else "top_prob",
            _from_model_config=True,
        )


__all__ = ["VMDGenerationConfig"]
