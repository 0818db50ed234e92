"""Folders and repositories that load anywhere: the model with its code, for `trust_remote_code=True`."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_vmd import VMDConfig
from .modeling_vmd import VMDForMaskedDiffusion
from .saving_vmd import saved_with_code


def load_tokenizer(model: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, a folder or an id on the Hub.

    Raises:
        ValueError: if there is none, which transformers says less clearly.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except ValueError as error:
        if Path(model).is_dir() and not Path(model, "tokenizer_config.json").exists():
            raise ValueError(
                f"{model} has no tokenizer: put it there by tokenizer.save_pretrained({model})"
            ) from error
        raise


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


def upload_model(
    model: VMDForMaskedDiffusion,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    **settings,
) -> CommitInfo:
    """`export_model` into a temporary folder, with `card` as its README.md, then `upload_folder` with `settings`."""
    with TemporaryDirectory() as folder:
        export_model(model, folder, tokenizer)
        if card is not None:
            Path(folder, "README.md").write_text(card)
        return upload_folder(folder, repo_id, **settings)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def load_model(
    name: str | os.PathLike, device: str | torch.device | None = None, **settings: object
) -> PreTrainedModel:
    """A saved model, or the model with an adapter, in evaluation mode on `device` (default: [`default_device`]).

    Args:
        settings: Of `AutoModelForMaskedLM.from_pretrained`.
    """
    return AutoModelForMaskedLM.from_pretrained(name, **settings).to(device or default_device()).eval()


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


__all__ = [
    "check_tokenizer",
    "default_device",
    "export_model",
    "load_model",
    "load_tokenizer",
    "saved_with_code",
    "upload_folder",
    "upload_model",
]
