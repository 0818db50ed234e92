"""Generate text with a saved model; with --watch, see it appear step by step.

    python training_scripts/generate_vmd.py --model outputs/sotu --max_new_tokens 64 --num_steps 16 --watch
    python training_scripts/generate_vmd.py --model outputs/sotu --prompt "the congress of the [MASK][MASK][MASK]"

    python training_scripts/generate_vmd.py --model outputs/sotu --input prompts.jsonl --output texts.jsonl
    accelerate launch --num_processes 8 training_scripts/generate_vmd.py --model DIR --input FILE --output FILE

With --input, a file of lines like {"prompt": "..."}, --output has the same lines with `text` and `completion`. After a
kill the same command goes on where it was; over several processes and machines that share these files, each row is
generated once.

Mask tokens in a prompt are gaps to fill; --max_new_tokens appends more. Settings that are not given are those saved
with the model. --watch draws in the terminal, or prints one line a step where there is no terminal.
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import HfArgumentParser


@dataclass
class GenerationArguments:
    """Fields of VMDGenerationConfig; what is not given stays as it was saved with the model."""

    max_new_tokens: int | None = field(default=None, metadata={"help": "Tokens to append to the prompt."})
    num_steps: int | None = field(default=None, metadata={"help": "Forward passes, with blocks for each block."})
    remasking: Literal["random", "top_prob", "top_prob_margin", "entropy", "left_to_right"] | None = None
    do_sample: bool | None = field(default=None, metadata={"help": "Draw tokens instead of taking the most probable."})
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    confidence_threshold: float | None = None
    resample_latents: bool | None = field(default=None, metadata={"help": "A latent for each step, not a shared one."})
    latent_scale: float | None = None
    corrector: Literal["cap", "rescale", "confidence"] | None = None
    corrector_strength: float | None = None
    guidance_scale: float | None = None
    use_cache: bool | None = None
    cache_implementation: Literal["dynamic", "static"] | None = None


@dataclass
class ScriptArguments:
    """What to generate from, and how to show it."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    prompt: str = field(default="", metadata={"help": "Text to go on from; mask tokens in it are gaps to fill."})
    input: str | None = field(
        default=None, metadata={"help": 'JSON lines {"prompt": "..."} in the place of a prompt.'}
    )
    output: str | None = field(default=None, metadata={"help": "File for the lines of --input with their texts."})
    batch_size: int = field(default=32, metadata={"help": "Prompts of --input at a time."})
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator if there is one, else cpu."})
    seed: int = 0
    watch: bool = field(default=False, metadata={"help": "Show the text after every step."})
    seconds_per_step: float = field(default=0.1, metadata={"help": "Pause after each step while watching."})
    trust_remote_code: bool = False


def main(argv: list[str]) -> None:
    args, settings = HfArgumentParser((ScriptArguments, GenerationArguments)).parse_args_into_dataclasses(args=argv)

    import torch  # what follows takes seconds to import, which --help need not wait for
    from rich.console import Console

    from vmd_hf.bulk import generate_file, processes
    from vmd_hf.hub import check_tokenizer, encode_text, load_model, load_tokenizer
    from vmd_hf.live_view import TextView

    if (args.input is None) != (args.output is None):
        raise ValueError(f"input and output must be given together, got {args.input} and {args.output}")
    device = args.device
    if args.input is not None and device is None:
        device = processes().device  # of several processes, each has its own
    model = load_model(args.model, device, trust_remote_code=args.trust_remote_code)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(tokenizer, model.config)
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    if args.input is not None:
        generate_file(model, tokenizer, args.input, args.output, args.batch_size, args.seed, **given)
        return
    input_ids = encode_text(args.prompt, tokenizer).to(model.device)
    if not args.prompt:
        given.setdefault("max_new_tokens", model.config.max_position_embeddings)

    console = Console()
    view = TextView(tokenizer, console, args.seconds_per_step) if args.watch else None
    start = time.perf_counter()
    output = model.generate(
        input_ids,
        generator=torch.Generator(model.device).manual_seed(args.seed),
        streamer=view,
        return_dict_in_generate=True,
        **given,
    )
    seconds = time.perf_counter() - start
    if view is None or view.live is None:
        console.print(tokenizer.decode(output.sequences[0]), soft_wrap=True, highlight=False, markup=False)
    console.print(f"[dim]{int(output.num_forward_passes[0])} forward passes, {seconds:.2f} s[/dim]", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
