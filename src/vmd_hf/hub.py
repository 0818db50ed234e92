"""Models and tokenizers from folders and the Hub, and exports that load anywhere: the model with its code, for
`trust_remote_code=True`."""

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import (
    CommitInfo,
    HfApi,
    ModelCard,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_vmd import VMDConfig
from .modeling_vmd import VMDForMaskedDiffusion
from .pipeline_vmd import tokenize
from .saving_vmd import saved_with_code

CARD_FILES = ("README.md", "results.json")


def default_device() -> torch.device:
    """The accelerator, if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def check_model(name: str | os.PathLike) -> None:
    """Says at once that a model is not there; loading it would ask the Hub for it, and retry for more than a minute.

    What is no folder and cannot be an id on the Hub (which is "name" or "owner/name", so neither a path that starts
    with "/", "." or "~" nor one with several "/") is missing. What may be either, like "outputs/d1", and is not in the
    cache of the Hub's client, the Hub is asked for, once. Of an adapter the model that it is for is checked, too.

    Raises:
        ValueError: if there is no such model.
    """
    if Path(name).is_dir():
        adapter = Path(name, "adapter_config.json")
        if adapter.is_file() and (base := json.loads(adapter.read_text()).get("base_model_name_or_path")):
            check_model(base)
        return
    try:
        files = ("config.json", "adapter_config.json", "tokenizer_config.json")
        if any(isinstance(try_to_load_from_cache(str(name), file), str) for file in files):
            return
        get_hf_file_metadata(hf_hub_url(str(name), "config.json"), timeout=5)
    except HFValidationError:
        missing = "no such folder"
    except RepositoryNotFoundError:
        missing = "no such folder, and no such model on the Hub"
    except HfHubHTTPError:
        return  # the Hub knows it; what else is wrong, loading says
    except Exception as error:  # of the network, whose classes differ between versions of the client
        missing = f"no such folder, and the Hub could not be asked ({' '.join(str(error).split())})"
    else:
        return
    raise ValueError(f"model must be a folder or the id of a model on the Hub, got {str(name)!r}: {missing}")


def load_model(
    name: str | os.PathLike, device: str | torch.device | None = None, **settings: object
) -> PreTrainedModel:
    """A saved model, or the model with an adapter, in evaluation mode on `device` (default: [`default_device`]).

    Args:
        settings: Of `AutoModelForMaskedLM.from_pretrained`.

    Raises:
        ValueError: if there is no such model.
    """
    check_model(name)
    return AutoModelForMaskedLM.from_pretrained(name, **settings).to(device or default_device()).eval()


def load_tokenizer(model: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, a folder or an id on the Hub.

    Raises:
        ValueError: if there is no such model, or no tokenizer beside it. (transformers either says so less clearly or
            invents one of special tokens only.)
    """
    check_model(model)
    missing = f"{model} has no tokenizer: put it there by tokenizer.save_pretrained({str(model)!r})"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except ValueError as error:
        if Path(model).is_dir() and not Path(model, "tokenizer_config.json").exists():
            raise ValueError(missing) from error
        raise
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(missing)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: VMDConfig) -> None:
    """Whether a tokenizer can be that of a model. The model's vocabulary may be larger, as where it was padded.

    Raises:
        ValueError: if it has no mask token, another one than the model, or more tokens than the model.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer must have a mask token, got none")
    if tokenizer.mask_token_id != config.mask_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer must be the model's, which has {config.vocab_size} tokens and the mask token "
            f"{config.mask_token_id}, got one that has {len(tokenizer)} and {tokenizer.mask_token_id}"
        )


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(1, tokens) int64, without special tokens but for those that the text spells out.

    Raises:
        ValueError: as in [`~vmd_hf.pipeline_vmd.tokenize`].
    """
    ids = tokenize(text, tokenizer, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def export_model(
    model: VMDForMaskedDiffusion,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Saves weights, configs, the code of the model and its pipeline and, if given, the tokenizer, ready to upload.

    Other files in the folder (a card, results) stay. An interruption leaves no half-written file.

    Raises:
        ValueError: if `folder` is a file.
    """
    with saved_with_code(model, tokenizer):
        model.save_pretrained(folder)


def copy_card(model: str | os.PathLike, folder: str | os.PathLike) -> list[str]:
    """Copies the card and the results that stand in a model's folder beside an export of it, in place of those there.

    Returns:
        The names of the files that were copied.
    """
    names = [name for name in CARD_FILES if Path(model, name).is_file()]
    if Path(model).resolve() == Path(folder).resolve():
        return names
    for name in names:
        partial = Path(folder, f"{name}.partial")
        shutil.copyfile(Path(model, name), partial)
        partial.replace(Path(folder, name))
    return names


def upload_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Uploads an exported folder in one commit, after its card was found valid; the repository is made if it is not
    there. Whatever fails before the commit leaves the repository as it was.

    Raises:
        ValueError: for a folder without a config or weights, or with a card whose metadata is not valid.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"folder must be an exported model, got {folder} without {name}")
    if (folder / "README.md").is_file():
        ModelCard.load(folder / "README.md").validate()
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=["_*", "*.partial"],
    )


__all__ = [
    "check_model",
    "check_tokenizer",
    "copy_card",
    "default_device",
    "encode_text",
    "export_model",
    "load_model",
    "load_tokenizer",
    "saved_with_code",
    "upload_folder",
]
