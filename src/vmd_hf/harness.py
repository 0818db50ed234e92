"""lm-evaluation-harness: the model `vmd`, by which its tasks score and prompt models of this package (extra `eval`).

    vmd-hf lm-eval --model vmd --model_args pretrained=model_cards/vmd-d1,num_steps=1 --tasks NAME --include_path DIR

The harness finds models by name only after the module that defines them was imported, for which its own command has no
option; `vmd-hf lm-eval` is that command with this module imported. In Python:

    import vmd_hf.harness
    lm_eval.simple_evaluate(model="vmd", model_args={"pretrained": "model_cards/vmd-d1"}, tasks=[...])
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .hub import check_tokenizer, default_device, load_model, load_tokenizer
from .likelihood import Bound, Order, nelbo
from .modeling_vmd import VMDForMaskedDiffusion

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError("vmd_hf.harness needs the package lm-eval: pip install vmd_hf[eval]") from error

logger = logging.getLogger(__name__)


@dataclass
class _Row:
    """A request in tokens.

    Attributes:
        context: Given.
        continuation: To be scored.
        seed: Of everything that is drawn for it.
        settings: Of generation.
    """

    context: list[int]
    continuation: list[int] = field(default_factory=list)
    seed: int = 0
    settings: dict = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What rows of one batch have in common."""
        return json.dumps(self.settings, sort_keys=True)


@register_model("vmd")
class VMDLM(TemplateLM):
    """A [`VMDForMaskedDiffusion`] for tasks of lm-evaluation-harness.

    Log-likelihoods are minus a bound of [`nelbo`], in nats: in expectation they are not above log p(continuation |
    context) of the sampler that takes `num_steps` steps and reveals tokens in `order`, at temperature 1. No token is
    put before a text: a masked diffusion model predicts the first one, too.

    `is_greedy` says whether one call of `generate` gives the continuation: the most probable tokens, as many masks as
    the continuation has tokens, the remasking rule and the sampler that are saved with the model. With a latent that
    depends on a draw of z.

    What is drawn is a function of `seed` and of the request: it depends neither on the batch nor on the order of the
    requests. Continuations of one context share it, and so are compared under one order and the same draws of z.

    A context that is too long loses its beginning, with a warning. One process.

    Args:
        pretrained: A folder or Hub id, or the model itself.
        tokenizer: Default: the one beside the model, without special tokens.
        bound: `"per_sample"` or `"per_step"`; default: the one that belongs to the model's objective (`per_step` for
            `vmd`).
        num_steps: T of the bounds and of generation; default: that of the model's generation config, or, where it has
            none, one token a step.
        num_samples, num_orders, order: As in [`nelbo`].
        batch_size: Requests in one forward pass; `"auto"` is not supported.
        max_length: Most tokens of context and continuation; default: `max_position_embeddings`.
        max_gen_toks: New tokens where a task does not say how many.
        check_greedy: `False` saves the generation behind `is_greedy`, which is `False` then.
        device: Default: the accelerator, if there is one.
        seed: Of all that is drawn.

    Raises:
        ValueError: for a model that is no VMD or has no tokenizer, for values out of range.
    """

    def __init__(
        self,
        pretrained: str | VMDForMaskedDiffusion,
        tokenizer: PreTrainedTokenizerBase | None = None,
        bound: Bound | None = None,
        num_steps: int | None = None,
        num_samples: int = 1,
        num_orders: int = 1,
        order: Order = "random",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        check_greedy: bool = True,
        device: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # what the command passes where --device was not given
        model = pretrained
        if isinstance(pretrained, str):
            model = load_model(pretrained, device)
            tokenizer = tokenizer or load_tokenizer(pretrained)
        if not isinstance(model, VMDForMaskedDiffusion):
            raise ValueError(f"pretrained must be a VMDForMaskedDiffusion, got {type(model).__name__}")
        if tokenizer is None:
            raise ValueError("tokenizer must be given with a model object, got None")
        longest = model.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(
                f"max_length must lie between 1 and max_position_embeddings = {longest}, got {max_length}"
            )
        check_tokenizer(tokenizer, model.config)
        self.model = model.to(device or default_device()).eval()
        self.tokenizer = tokenizer
        self.bound = bound or ("per_sample" if model.config.objective == "per_sample" else "per_step")
        self.num_steps = model.generation_config.num_steps if num_steps is None else num_steps
        self.num_samples, self.num_orders, self.order = num_samples, num_orders, order
        self.batch_size = int(batch_size)
        self.max_length = max_length or longest
        self.max_gen_toks = max_gen_toks
        self.check_greedy = check_greedy
        self.seed = seed
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens), **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Minus the bound of each request's continuation given its context, which may be empty, and `is_greedy`.

        Raises:
            ValueError: for a continuation that is longer than `max_length`, or holds the mask or pad token.
        """
        rows = []
        for request in requests:
            context, continuation = request.args
            ids = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            rows.append((request.args, *ids))
        answers = self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            seed = request_seed(self.seed, context or continuation)
            context = self._last(context, self.max_length - len(continuation), "continuation")
            rows.append(_Row(context, continuation, seed))
        return self._in_batches(lambda batch: self._score(batch, self.check_greedy), rows, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Minus the sum of the bounds of each text's windows, in which each token is scored once.

        The first window has no context; the others hold `max_length` tokens, of which the first was scored before and
        is context now, and in the last one all that were.
        """
        windows = [rolling_windows(self.tok_encode(*request.args), self.max_length) for request in requests]
        rows = [
            _Row(context, continuation, request_seed(self.seed, context + continuation))
            for of_text in windows
            for context, continuation in of_text
        ]
        scores = iter(self._in_batches(lambda batch: self._score(batch, False), rows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """`max_gen_toks` new tokens after each context, cut at the first of the strings `until`.

        Greedy unless the request says `do_sample`. Any setting of `generate` may stand in a request. One that comes
        several times gets a draw of its own each time.

        Raises:
            ValueError: for more than `max_length` new tokens, or a setting that `generate` does not know.
        """
        rows, seen = [], Counter()
        for request in requests:
            context, settings = request.args
            ids, settings = self.tok_encode(context), dict(normalize_gen_kwargs(settings, self.max_gen_toks))
            row = _Row(self._last(ids, self.max_length - settings["max_gen_toks"], "max_gen_toks"), settings=settings)
            key = (context, row.group)
            row.seed = request_seed(self.seed, ids, seen[key])
            seen[key] += 1
            rows.append(row)
        texts = self._in_batches(self._generate, rows, disable_tqdm)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _last(self, context: list[int], room: int, name: str) -> list[int]:
        """As many tokens as there is room for beside what `name` takes."""
        if room < 0:
            needed = self.max_length - room
            raise ValueError(f"{name} must be at most max_length = {self.max_length} tokens, got {needed}")
        if len(context) > room:
            logger.warning("a context of %d tokens was cut to its last %d: max_length", len(context), room)
        return context[max(len(context) - room, 0) :]

    def _in_batches(self, function: Callable[[list[_Row]], Iterable], rows: list[_Row], disable_tqdm: bool) -> list:
        """`function` of batches of rows of one group and similar length; the results in the order of the rows."""
        results = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (rows[i].group, -len(rows[i].context + rows[i].continuation)))
        with tqdm(total=len(rows), disable=disable_tqdm) as progress:
            for _, group in groupby(order, key=lambda i: rows[i].group):
                indices = list(group)
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    for index, result in zip(batch, function([rows[i] for i in batch]), strict=True):
                        results[index] = result
                    progress.update(len(batch))
        return results

    def _pad(self, rows: list[list[int]], value: int = 0) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(self.device)

    def _score(self, batch: list[_Row], check_greedy: bool) -> list[tuple[float, bool]]:
        """Minus the bound of each row, and whether it is what is generated."""
        input_ids = self._pad([row.context + row.continuation for row in batch])
        labels = self._pad([[-100] * len(row.context) + row.continuation for row in batch], -100)
        attention_mask = self._pad([[1] * len(row.context + row.continuation) for row in batch])
        if not input_ids.shape[1]:
            return [(0.0, check_greedy)] * len(batch)
        output = nelbo(
            self.model,
            input_ids,
            labels,
            attention_mask,
            bound=self.bound,
            num_steps=input_ids.shape[1] if self.num_steps is None else self.num_steps,
            num_samples=self.num_samples,
            num_orders=self.num_orders,
            order=self.order,
            generator=_generators(batch),
        )
        is_greedy = torch.zeros(len(batch), dtype=torch.bool)
        if check_greedy:
            scored = labels != -100
            canvas = input_ids.masked_fill(scored, self.model.config.mask_token_id)
            filled = self._call_generate(batch, canvas, attention_mask, max_new_tokens=None)
            is_greedy = ((filled == input_ids) | ~scored).all(-1)
        return list(zip((-output.nelbo).tolist(), is_greedy.tolist(), strict=True))

    def _generate(self, batch: list[_Row]) -> list[str]:
        settings = dict(batch[0].settings)
        until, count = settings.pop("until"), settings.pop("max_gen_toks")
        input_ids = self._pad([row.context for row in batch])
        attention_mask = self._pad([[1] * len(row.context) for row in batch])
        filled = self._call_generate(batch, input_ids, attention_mask, max_new_tokens=count, **settings)
        texts = self.tokenizer.batch_decode(filled[:, -count:], skip_special_tokens=True)
        return [cut(text, until) for text in texts]

    def _call_generate(self, batch: list[_Row], input_ids, attention_mask, do_sample=False, **settings):
        if not do_sample:
            settings |= {"temperature": None, "top_k": None, "top_p": None}
        plain = dict.fromkeys(("return_dict_in_generate", "output_history", "output_confidences"), False)
        settings = {"num_steps": self.num_steps, "do_sample": do_sample} | settings | plain
        return self.model.generate(input_ids, attention_mask, generator=_generators(batch), **settings)


def request_seed(seed: int, input_ids: list[int], repeat: int = 0) -> int:
    """A seed in 63 bits that is a function of these three, in any process."""
    digest = blake2b(repr((seed, input_ids, repeat)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rolling_windows(input_ids: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of context and continuation, `max_length` tokens together at most; the continuations are the whole.

    After the first window each has a token of context if there is room, and the last one as many as there is room for.
    """
    windows, end = [], 0
    while end < len(input_ids):
        start, end = end, min(end + max_length - min(end, 1, max_length - 1), len(input_ids))
        windows.append((input_ids[max(end - max_length, 0) : start], input_ids[start:end]))
    return windows


def cut(text: str, until: list[str]) -> str:
    """The text before the first of these strings; empty ones are none."""
    for stop in filter(None, until):
        text = text.split(stop)[0]
    return text


def _generators(batch: list[_Row]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row.seed) for row in batch]


__all__ = ["VMDLM", "cut", "request_seed", "rolling_windows"]
