"""What a recipe holds: the arguments of a training, from a YAML file and the command line."""

import re
from dataclasses import dataclass, field, make_dataclass
from inspect import get_annotations
from typing import Literal

import yaml
from transformers import TrainingArguments

from .arguments import argument_parser
from .configuration_vmd import VMDConfig

# What the tokenizer, the data and the length of training decide, and what fits on no command line.
_NO_ARGUMENTS = {
    "vocab_size",
    "max_position_embeddings",
    "position_groups",
    "rope_parameters",
    "kl_warmup_steps",
    "mask_token_id",
    "pad_token_id",
    "eos_token_id",
    "backbone_config",
}
# The models of the recipes are small, and so is that of a recipe that gives no sizes.
_DEFAULTS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "position_embedding_type": "learned",
    "latent_size": 8,
}
_PARSED_AS = {
    float | int: float,
    list[int] | tuple[int, ...]: list[int],
}


def _config_arguments() -> type:
    """A dataclass of the fields of `VMDConfig` that a recipe may set; the help is first sentences of its docstring."""
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", VMDConfig.__doc__ or "", flags=re.MULTILINE)
    texts = {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    fields = []
    for name, hint in get_annotations(VMDConfig).items():
        if name in _NO_ARGUMENTS:
            continue
        default = _DEFAULTS.get(name, getattr(VMDConfig, name))
        text = texts.get(name, "").partition(". ")[0].replace("%", "%%")
        settings = {"metadata": {"help": text}}
        if isinstance(default, list | tuple):
            settings["default_factory"] = lambda default=default: list(default)
        else:
            settings["default"] = default
        fields.append((name, _PARSED_AS.get(hint, hint), field(**settings)))
    return make_dataclass("ConfigArguments", fields)


ConfigArguments = _config_arguments()


@dataclass
class ModelArguments(ConfigArguments):
    """The fields of `VMDConfig`, where a model starts from, and what follows from the length of training."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this model, whose sizes and tokenizer stay; or from a language model of transformers, "
            "masked or causal (see backbone_type)."
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train only what was added to a language model of transformers."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Train an adapter of this rank on that model."})
    lora_alpha: int = 16
    lora_latent: bool = field(default=False, metadata={"help": "And train the whole latent path along with it."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa (default), flex_attention."})
    block_positions: bool = field(
        default=False, metadata={"help": "Embed each token's position in its block, as position_groups."}
    )
    kl_warmup_ratio: float = field(default=0.5, metadata={"help": "Share of training over which the KL term grows."})
    ema_decay: float | None = field(default=None, metadata={"help": "Keep an average of the weights and use it."})


@dataclass
class DataArguments:
    """What to train on."""

    task: Literal["synthetic", "text", "sudoku", "receptors", "antibodies", "instructions"] = "synthetic"
    setting: str = field(default="d1", metadata={"help": "The synthetic joint distribution."})
    correlation: float | None = field(default=None, metadata={"help": "p of two_token_correlated."})
    num_train_rows: int = field(
        default=200_000, metadata={"help": "Synthetic rows, Sudoku puzzles, receptors or loops of antibodies to make."}
    )
    min_clues: int = field(default=22, metadata={"help": "Fewest clues of a Sudoku to train on; see max_clues."})
    max_clues: int = field(default=36, metadata={"help": "Most clues; 0: whole boards instead of puzzles."})
    extra_clues: int = field(default=0, metadata={"help": "Further clues, a random number from 0 to this one."})
    structure: bool = field(default=True, metadata={"help": "Embed each cell's row, column and box."})
    source: str = field(
        default="sotu",
        metadata={
            "help": "sotu (the State of the Union addresses), a .txt file, a folder of such files (one document "
            "each), of JSON, CSV or Parquet files, or a dataset id on the Hub."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of a dataset with the text of a document."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    streaming: bool = field(default=False, metadata={"help": "Read the source while training, not all of it before."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a tokenizer; or characters: text is reduced to 27, a to z and the space, "
            "digits spelled out. A given model has its own."
        },
    )
    tokenizer_size: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE tokenizer of so many tokens on the training text."}
    )
    documents: Literal["joined", "packed", "separate"] = field(
        default="joined",
        metadata={
            "help": "joined: one after the other, cut into rows. packed: the same rows, in which no document sees "
            "another. separate: each row is (a part of) one document, padded."
        },
    )
    where: list[str] = field(
        default_factory=list,
        metadata={"help": "Documents to select: president=Lincoln ...; nothing behind it selects all."},
    )
    sequence_length: int = 128
    num_eval_rows: int = field(default=1000, metadata={"help": "Rows to evaluate on while training."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Arguments from a recipe file (the first of `argv`, if it ends in .yaml) and the command line.

    Raises:
        ValueError: the recipe has a name that is no argument.
    """
    parser = argument_parser((ModelArguments, DataArguments, TrainingArguments))
    if not {"-h", "--help"} & set(argv):  # which do without torch
        import torch

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


__all__ = ["ConfigArguments", "DataArguments", "ModelArguments", "parse"]
