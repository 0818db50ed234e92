"""`pipeline("masked-diffusion")`: strings with mask tokens, or prompts, in; text with confidences out."""

import re
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, BatchEncoding, Pipeline, PreTrainedTokenizerBase

from .canvas_vmd import prepare_canvas
from .generation_configuration_vmd import VMDGenerationConfig

TASK = "masked-diffusion"
_OUTPUT_SETTINGS = {"return_dict_in_generate", "output_history", "output_confidences"}


class MaskedDiffusionPipeline(Pipeline):
    """Fills the mask tokens of texts, or, with `max_new_tokens`, continues them.

        pipe = pipeline("masked-diffusion", model="path or id")
        pipe("the [MASK][MASK][MASK] house", num_steps=2)
        pipe(["my fellow ", "we "], max_new_tokens=32, do_sample=True, seed=0, batch_size=2)

    Args of a call:
        texts: A string, a list or an iterator of them.
        seed: Each text gets a generator with this seed, so that what it gets does not depend on the batch. Default:
            torch's own generator.
        return_history: Whether to return the text after every step.
        generate_kwargs: Any other setting of `generate` (see [`VMDGenerationConfig`]).

    Returns:
        For each text a dict: `generated_text`; `tokens`, a list with a dict for each token that was filled: its
        `index` in the text, `token`, `token_str` and `confidence`, the probability that it had when it was revealed;
        and, on request, `history`, a list of texts with the mask tokens that were left.

    Raises:
        ValueError: for an unknown setting, or one that `generate` refuses.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False

    def _sanitize_parameters(self, seed=None, return_history=None, **generate_kwargs):
        unknown = sorted(set(generate_kwargs) - (set(vars(VMDGenerationConfig())) - _OUTPUT_SETTINGS))
        if unknown:
            raise ValueError(f"the {TASK} pipeline knows no argument {', '.join(map(repr, unknown))}")
        forward = dict(generate_kwargs)
        if seed is not None:
            forward["seed"] = seed
        if return_history is not None:
            forward["return_history"] = return_history
        return {}, forward, {}

    def preprocess(self, text):
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, got {text!r}")
        inputs = tokenize(text, self.tokenizer, return_tensors="pt")
        return {name: inputs[name].long() for name in ("input_ids", "attention_mask")}  # of an empty text, floats

    def _forward(self, inputs, seed=None, return_history=False, **generate_kwargs):
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        generator = None
        if seed is not None:
            generator = [torch.Generator().manual_seed(seed) for _ in input_ids]
        output = self.model.generate(
            input_ids,
            attention_mask,
            generator=generator,
            return_dict_in_generate=True,
            output_confidences=True,
            output_history=return_history,
            **generate_kwargs,
        )
        max_new_tokens = generate_kwargs.get("max_new_tokens", self.model.generation_config.max_new_tokens)
        inputs = (value.to(output.sequences.device) for value in (input_ids, attention_mask))
        canvas, real = prepare_canvas(*inputs, max_new_tokens, self.model.config.mask_token_id)
        results = {
            "sequences": output.sequences,
            "confidences": output.confidences,
            "filled": (canvas == self.model.config.mask_token_id) & (real != 0),
            "real": real,
        }
        if return_history:
            results["history"] = torch.stack([canvas, *output.history], dim=1)  # (batch, steps, length)
        return results

    def postprocess(self, outputs):
        row = {name: value[0] for name, value in outputs.items()}
        pad = self.tokenizer.pad_token_id
        keep = (row["real"] != 0) & (row["sequences"] != pad)  # what follows the end of a text is padding, too
        ids = row["sequences"][keep].tolist()
        filled, confidences = row["filled"][keep].tolist(), row["confidences"][keep].tolist()
        names = self.tokenizer.convert_ids_to_tokens(ids)
        result = {
            "generated_text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "tokens": [
                {"index": index, "token": token, "token_str": name, "confidence": confidence}
                for index, (token, name, confidence) in enumerate(zip(ids, names, confidences, strict=True))
                if filled[index]
            ],
        }
        if "history" in row:
            states = torch.unique_consecutive(row["history"], dim=0)  # a row waits for those that need more steps
            result["history"] = self.tokenizer.batch_decode([state[keep] for state in states])
        return result


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> BatchEncoding:
    """What `tokenizer(text, **settings)` gives.

    Raises:
        ValueError: for a character that a tokenizer of characters does not know.
    """
    try:
        return tokenizer(text, **settings)
    except Exception as error:  # of tokenizers, which raises nothing more special and says "Missing [UNK] token"
        known = "".join(token for token in tokenizer.get_vocab() if len(token) == 1)
        plain = re.sub("|".join(map(re.escape, tokenizer.all_special_tokens)), "", text)
        if unknown := "".join(dict.fromkeys(character for character in plain if character not in known)):
            raise ValueError(
                f"text must consist of characters of the vocabulary, {''.join(sorted(known))!r}, got {unknown!r}"
            ) from error
        raise


# As registering does, so that a pipeline that was loaded with its code is saved with it, too.
MaskedDiffusionPipeline._registered_impl = {TASK: {"impl": MaskedDiffusionPipeline, "pt": (AutoModelForMaskedLM,)}}


__all__ = ["MaskedDiffusionPipeline"]
