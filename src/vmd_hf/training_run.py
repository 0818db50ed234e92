"""A training from its arguments: data, model, callbacks, Trainer, and what is saved at the end."""

import os
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from .configuration_vmd import VMDConfig
from .data.antibodies import antibody_dataset, loop_sequences
from .data.instructions import instruction_dataset, load_instructions
from .data.receptors import SPLIT_SEEDS, receptor_dataset, receptor_sequences
from .data.sudoku import SudokuCollator, generate_puzzles, puzzle_dataset, random_boards, sudoku_position_groups
from .data.synthetic import synthetic_dataset
from .data.text import (
    collate,
    evenly_spaced,
    load_documents,
    stream_documents,
    text_datasets,
    text_stream,
    token_dataset,
)
from .generation_vmd import VMDGenerationConfig
from .hub import check_tokenizer, load_tokenizer, saved_with_code
from .modeling_vmd import VMDForMaskedDiffusion
from .recipes import ConfigArguments, DataArguments, ModelArguments
from .tokenization import task_tokenizer, text_tokenizer
from .training import (
    EMACallback,
    FiniteGradientsCallback,
    SeededNoiseCallback,
    VMDMetricsCallback,
    last_whole_checkpoint,
)

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

LATENT_PATH = ["conditioner", "modulation", "latent_prior", "latent_encoder"]
# What training may change of a given model; the rest of its config is its own.
TRAINING_SETTINGS = {
    "num_loops",
    "loop_loss",
    "objective",
    "objective_steps",
    "left_to_right",
    "latent_min_tokens",
    "kl_weight",
    "hidden_dropout",
    "causal_loss_weight",
}
# What a given model without a latent gets together with one.
LATENT_SETTINGS = {
    "latent_type",
    "latent_size",
    "candidate_tokens",
    "prior",
    "conditioning_size",
    "latent_input",
    "num_latent_encoder_layers",
}


SHUFFLE_BUFFER = 10_000  # rows of a stream that are mixed with one another
TOKENIZER_DOCUMENTS = 10_000  # of a stream, on which a tokenizer is trained


def read_documents(args: DataArguments) -> dict[str, list[str]] | dict[str, IterableDataset]:
    """The documents of each split of a task with a source: texts, or rows of instructions."""
    if args.task == "instructions":
        return load_instructions(args.source, args.config_name, args.num_eval_rows)
    if not args.streaming:
        return load_documents(
            args.source, text_column=args.text_column, config_name=args.config_name, where=args.where
        )
    if args.where:
        raise ValueError(f"where must be empty with streaming, got {args.where}")
    return stream_documents(args.source, args.text_column, args.config_name)


def build_tokenizer(
    args: DataArguments, model: str | None, documents: dict[str, list[str]] | dict[str, IterableDataset] | None
) -> PreTrainedTokenizerBase:
    """That of a given model (a folder or Hub id), or of a new one."""
    if args.task not in ("text", "instructions"):
        return task_tokenizer(args.task, model)
    if args.task == "instructions":
        return text_tokenizer(model, args.tokenizer)
    texts = documents["train"]
    if args.streaming:
        texts = (row["text"] for row in texts.take(TOKENIZER_DOCUMENTS))
    return text_tokenizer(model, args.tokenizer, args.tokenizer_size, texts)


def build_data(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    documents: dict[str, list[str]] | dict[str, IterableDataset] | None = None,
    seed: int = 0,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training rows, and validation rows (a synthetic target is known: it needs none).

    Args:
        documents: of the task text, as of `read_documents`.
        seed: of the order in which rows of a stream are mixed; others are shuffled by the Trainer.
    """
    if args.task == "synthetic":
        return synthetic_dataset(args.setting, args.num_train_rows, seed=0, correlation=args.correlation), None
    if args.task in ("receptors", "antibodies"):
        draw, dataset = {
            "receptors": (receptor_sequences, receptor_dataset),
            "antibodies": (loop_sequences, antibody_dataset),
        }[args.task]
        numbers = {"train": args.num_train_rows, "validation": args.num_eval_rows}
        rows = [dataset(draw(count, SPLIT_SEEDS[split])) for split, count in numbers.items()]
        return rows[0], rows[1]
    if args.task == "sudoku":
        count = args.num_train_rows + args.num_eval_rows
        if args.max_clues:
            puzzles, solutions = generate_puzzles(count, (args.min_clues, args.max_clues), seed=0)
        else:
            solutions = random_boards(count, seed=0)
            puzzles = np.zeros_like(solutions)
        rows = puzzle_dataset(puzzles, solutions, tokenizer)
        train, validation = range(args.num_eval_rows, count), range(args.num_eval_rows)
        return rows.select(train), rows.select(validation)
    if args.task == "instructions":
        return tuple(
            instruction_dataset(documents[name], tokenizer, args.sequence_length) for name in ("train", "validation")
        )
    settings = tokenizer, args.sequence_length, args.documents
    if not args.streaming:
        splits = text_datasets(documents, *settings)
        return splits["train"], evenly_spaced(splits["validation"], args.num_eval_rows)
    streams = {name: text_stream(stream, *settings) for name, stream in documents.items()}
    held_out = list(streams["validation"].with_format("numpy").take(args.num_eval_rows))
    columns = {name: [row[name] for row in held_out] for name in held_out[0]}
    return streams["train"].shuffle(seed, buffer_size=SHUFFLE_BUFFER), token_dataset(**columns)


def groups_of_positions(
    model_args: ModelArguments, data_args: DataArguments, sequence_length: int
) -> list[list[int]] | None:
    """Rows, columns and boxes of a Sudoku, or each token's position in its block."""
    if data_args.task == "sudoku" and data_args.structure:
        return sudoku_position_groups()
    if model_args.block_positions and model_args.block_size:
        return [[position % model_args.block_size for position in range(sequence_length)]]
    return None


def build_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_training_forwards: int,
    position_groups: list[list[int]] | None = None,
) -> VMDForMaskedDiffusion:
    """A new model of the task's size, or the given checkpoint, which keeps its shape, but for `num_loops` and, around
    a language model, `block_size`, and gets a latent (or a causal head) if it has none and one is asked for. Or one
    around a language model of transformers that is given itself."""
    settings = {name: getattr(args, name) for name in ConfigArguments.__dataclass_fields__}
    latent = {name: settings.pop(name) for name in LATENT_SETTINGS}
    if not args.latent_size:
        latent = {"latent_size": 0}
    training = {
        "kl_warmup_steps": round(args.kl_warmup_ratio * num_training_forwards),
        "attn_implementation": args.attn_implementation,
    }
    if args.model_name_or_path:
        training |= {name: settings[name] for name in TRAINING_SETTINGS}
        given, added = AutoConfig.from_pretrained(args.model_name_or_path), {}
        if not isinstance(given, VMDConfig):
            fields = training | latent | {name: settings[name] for name in ("block_size", "causal_head_size")}
            if args.backbone_type == "masked_lm":
                return VMDForMaskedDiffusion.from_masked_lm(args.model_name_or_path, **fields)
            fields["token_shift"] = args.token_shift
            return VMDForMaskedDiffusion.from_causal_lm(args.model_name_or_path, **fields)
        if given.backbone_config is not None and args.block_size:
            training["block_size"] = args.block_size
        if args.latent_size and not given.latent_size:
            added = latent
        if args.causal_head_size and not given.causal_head_size:
            added = {**added, "causal_head_size": args.causal_head_size}
        model = VMDForMaskedDiffusion.from_pretrained(args.model_name_or_path, **training, **added)
        if added:  # the sampler that it has now
            model.generation_config = VMDGenerationConfig.from_model_config(model.config)
        return model
    config = VMDConfig(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=sequence_length,
        position_groups=position_groups,
        **settings,
        **latent,
        **training,
    )
    return VMDForMaskedDiffusion(config)


def freeze_backbone(model: VMDForMaskedDiffusion) -> None:
    """Leaves to train what was added to a language model of transformers.

    Raises:
        ValueError: there is none, or nothing was added.
    """
    if model.config.backbone_config is not None:
        model.model.language_model.requires_grad_(False)
        if any(parameter.requires_grad for parameter in model.parameters()):
            return
    raise ValueError(
        "freeze_backbone needs a language model of transformers with a latent or a causal head, got "
        f"{type(model.config.backbone_config).__name__}, latent_size={model.config.latent_size} and "
        f"causal_head_size={model.config.causal_head_size}"
    )


def build_adapted_model(args: ModelArguments) -> "PeftModel":
    """The given model, all of whose settings hold, with a new adapter, or with the one that it is.

    The KL term has its full weight from the start: a warm-up's progress is part of no adapter.

    Raises:
        ValueError: no model is given.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    if args.model_name_or_path is None:
        raise ValueError("model_name_or_path must name the model that lora_r adapts, got None")
    name, settings = args.model_name_or_path, {"attn_implementation": args.attn_implementation, "kl_warmup_steps": 0}
    if Path(name, "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        model = VMDForMaskedDiffusion.from_pretrained(base, **settings)
        return PeftModel.from_pretrained(model, name, is_trainable=True)
    model = VMDForMaskedDiffusion.from_pretrained(name, **settings)
    modules = LATENT_PATH if args.lora_latent else []
    if model.config.num_states:  # a head of its own, most of which is tables: it is trained wholly
        modules = [*modules, "chain"]
    return get_peft_model(model, LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, modules_to_save=modules))


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


def use_one_device(args: TrainingArguments) -> None:
    """The Trainer splits the batches of one process over all GPUs by `DataParallel`, whose copies of the model draw
    the same noise and lose what they count (`kl_warmup_steps`)."""
    if args.n_gpu > 1:
        logger.warning(f"one of {args.n_gpu} GPUs is used; for all of them: accelerate launch")
        args._n_gpu = 1


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Trainer:
    """Trains, saves model and tokenizer in the output folder, and returns the Trainer, whose model stays on the
    device that it was trained on.

    Raises:
        ValueError: `max_steps` below 1, or a tokenizer that is not that of the given model.
    """
    if training_args.max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {training_args.max_steps}")
    resume = checkpoint_to_resume(training_args)
    use_one_device(training_args)
    set_seed(training_args.seed)
    documents = read_documents(data_args) if data_args.task in ("text", "instructions") else None
    if resume:  # one that was trained with the model is not trained again
        tokenizer = load_tokenizer(resume)
    else:
        tokenizer = build_tokenizer(data_args, model_args.model_name_or_path, documents)
    rows, validation = build_data(data_args, tokenizer, documents, training_args.seed)
    length = data_args.sequence_length if documents is not None else len(rows[0]["input_ids"])
    # From a checkpoint of its last step the Trainer would do one more.
    finished = (
        resume and TrainerState.load_from_json(f"{resume}/trainer_state.json").global_step >= training_args.max_steps
    )
    if finished:
        model_args.model_name_or_path = resume
    if model_args.lora_r is None:
        forwards = training_args.max_steps * training_args.gradient_accumulation_steps
        groups = groups_of_positions(model_args, data_args, length)
        model = build_model(model_args, tokenizer, length, forwards, groups)
        if model_args.freeze_backbone:
            freeze_backbone(model)
    else:
        model = build_adapted_model(model_args)
        model.print_trainable_parameters()
    check_tokenizer(tokenizer, model.config)

    callbacks: list[TrainerCallback] = [SeededNoiseCallback(), FiniteGradientsCallback()]
    if model_args.ema_decay is not None:
        callbacks.append(EMACallback(model_args.ema_decay))
    if data_args.task == "text":
        callbacks.append(SampleCallback(tokenizer, data_args.sequence_length))
    collator = partial(collate, pad_token_id=tokenizer.pad_token_id or 0)  # of which nothing is read
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


__all__ = ["build_adapted_model", "build_data", "build_model", "train"]
