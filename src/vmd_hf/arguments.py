"""The parser of scripts' arguments."""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser, TrainingArguments


def argument_parser(dataclasses: Sequence[type]) -> HfArgumentParser:
    """A parser by which what a recipe sets can be cleared: `none` clears an optional value (`--block_size none`; not
    of the Trainer's arguments, to some of which "none" is a value), and a list that may be empty is so with nothing
    behind its name (`--where`)."""
    parser = HfArgumentParser(dataclasses)
    hints = [item for dtype in dataclasses if dtype is not TrainingArguments for item in get_type_hints(dtype).items()]
    optional = {name for name, hint in hints if NoneType in get_args(hint)}
    for action in parser._actions:
        if action.default == []:
            action.nargs = "*"
        elif action.dest in optional and action.nargs is None:
            action.type = _or_none(action.type)
            if action.choices is not None:
                action.choices = [*action.choices, None]
    return parser


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    read.__name__ = getattr(convert, "__name__", str(convert))  # what an error message calls it
    return read


__all__ = ["argument_parser"]
