"""Folders and repositories that load anywhere: the model with its code, for `trust_remote_code=True`."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import PreTrainedTokenizerBase

from .modeling_vmd import VMDForMaskedDiffusion, saved_with_code


def export_model(
    model: VMDForMaskedDiffusion,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Saves weights, configs, the code of the model and its pipeline and, if given, the tokenizer, ready to upload.

    Written beside the folder first and moved into place file by file, the config last: an interruption leaves no
    half-written file, and no config that names what is not there. Other files in the folder (a card, results) stay.

    Raises:
        ValueError: if `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"folder must not be a file, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        with saved_with_code(model, tokenizer):
            model.save_pretrained(partial)
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


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
        ignore_patterns=["*.partial"],
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


__all__ = ["export_model", "saved_with_code", "upload_folder", "upload_model"]
