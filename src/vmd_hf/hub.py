"""Folders that load anywhere: the model with its code, for `trust_remote_code=True` without vmd_hf installed."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from . import pipeline_vmd
from .configuration_vmd import VMDConfig
from .modeling_vmd import VMDForMaskedDiffusion, VMDModel

AUTO_CLASSES = ((VMDConfig, "AutoConfig"), (VMDModel, "AutoModel"), (VMDForMaskedDiffusion, "AutoModelForMaskedLM"))


def export_model(
    model: VMDForMaskedDiffusion,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Saves weights, configs, the model's code and, if given, the tokenizer, ready to upload.

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
        _save_with_code(model, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


def _save_with_code(model, folder):
    # Registered only while saving: otherwise every checkpoint of a training run would copy the code.
    auto_classes = [cls._auto_class for cls, _ in AUTO_CLASSES]
    auto_map = getattr(model.config, "auto_map", None)
    try:
        for cls, auto_class in AUTO_CLASSES:
            cls.register_for_auto_class(auto_class)
        model.config.auto_map = {"AutoModel": f"{VMDModel.__module__.rpartition('.')[2]}.{VMDModel.__name__}"}
        model.config.custom_pipelines = pipeline_vmd.CUSTOM_PIPELINES
        shutil.copy(pipeline_vmd.__file__, folder)
        model.save_pretrained(folder)
    finally:
        for (cls, _), auto_class in zip(AUTO_CLASSES, auto_classes, strict=True):
            cls._auto_class = auto_class
        del model.config.custom_pipelines
        model.config.auto_map = auto_map
        if auto_map is None:
            del model.config.auto_map


__all__ = ["export_model"]
