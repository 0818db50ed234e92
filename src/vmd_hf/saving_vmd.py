"""The base of all models of this package: initial weights, saving without half-written files, loading."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from .chain_vmd import VMDChainTables
from .configuration_vmd import REMOVED_FIELDS, VMDConfig
from .latents_vmd import VMDLatentEncoder, VMDPosteriorLinear
from .layers_vmd import VMDAttention, VMDGroupBias, VMDLayer, VMDUnitLinear, VMDZeroLinear

# Arguments of from_pretrained that say where files are.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class VMDPreTrainedModel(PreTrainedModel):
    config_class = VMDConfig
    config: VMDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ("VMDLayer",)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": VMDLayer, "attentions": VMDAttention}  # noqa: RUF012
    _tokenizer_to_save: PreTrainedTokenizerBase | None = None

    def post_init(self):
        super().post_init()
        # FSDP makes units of these, which must all be there; not of what holds the token embeddings, such as the
        # embeddings of BERT, since those of a backbone are called by themselves.
        tokens, names = self.get_input_embeddings(), self._no_split_modules
        units = [module for module in self.modules() if type(module).__name__ in names]
        self._no_split_modules = {
            type(unit).__name__ for unit in units if all(part is not tokens for part in unit.modules())
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any):
        """As everywhere; weights of version 0.7 are converted.

        Raises:
            OSError: if there are no weights, or they are not whole.
        """
        name, where = pretrained_model_name_or_path, {key: kwargs[key] for key in _WHERE if key in kwargs}
        try:
            if name is None or kwargs.get("state_dict") is not None or not is_of_version_0_7(name, **where):
                return super().from_pretrained(name, *args, **kwargs)
            config = kwargs.pop("config", None)
            if not isinstance(config, VMDConfig):
                config, kwargs = VMDConfig.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
            state = convert_weights(load_file(cached_file(name, SAFE_WEIGHTS_NAME, **where)), config)
            model = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
            if model.can_generate():
                path = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where)
                if path is not None:
                    model.generation_config = model.generation_config_class.from_pretrained(name, **where)
            return model
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} are not whole or not in the safetensors format "
                f"({error}): save, copy or download them again"
            ) from error

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As everywhere, but an interruption leaves no half-written file: each is written beside its place and then
        moved, the config last. A config that was loaded with code names none unless the code is saved, too.

        Raises:
            ValueError: if `save_directory` is a file.
        """
        if self._auto_class is None and hasattr(self.config, "auto_map"):
            del self.config.auto_map
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory must not be a file, got {folder}")
        if not self.should_save_on_this_rank(is_main_process):  # but has a part of split weights
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix="_partial-") as partial:
            self._write_files_beside_weights(folder, Path(partial))
            super().save_pretrained(partial, is_main_process, *args, **kwargs)
            written = sorted(Path(partial).iterdir(), key=lambda path: path.name == CONFIG_NAME)
            for path in written:
                os.replace(path, folder / path.name)
        stale = {path.name for path in folder.iterdir()} - {path.name for path in written}
        for name in filter(re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?").fullmatch, stale):
            if not kwargs.get("variant"):
                (folder / name).unlink()  # of another number of shards

    def _write_files_beside_weights(self, folder: Path, partial: Path) -> None:
        if hasattr(self.config, "custom_pipelines"):
            pipeline = Path(__file__).with_name("pipeline_vmd.py")
            if self._auto_class is not None and pipeline.exists():
                shutil.copy(pipeline, partial)
            elif not (folder / pipeline.name).exists():  # a pipeline that saves itself has written it
                del self.config.custom_pipelines
        if self._tokenizer_to_save is not None:
            self._tokenizer_to_save.save_pretrained(partial)

    def push_to_hub(self, *args, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs):
        """As everywhere; in the same commit go the code, so that it loads anywhere with `trust_remote_code=True`, and
        the tokenizer, if given."""
        with saved_with_code(self, tokenizer):
            return super().push_to_hub(*args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As everywhere; a vocabulary without the tokens that the config names is an error."""
        ids = (self.config.mask_token_id, self.config.pad_token_id, self.config.eos_token_id)
        largest = max((token for token in ids if isinstance(token, int)), default=-1)
        if new_num_tokens is not None and new_num_tokens <= largest:
            raise ValueError(
                f"new_num_tokens must leave mask_token_id, pad_token_id and eos_token_id {ids} in the vocabulary, got "
                f"{new_num_tokens}"
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.backbone_config is not None:
            self.config.backbone_config.vocab_size = self.config.vocab_size
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VMDZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, VMDPosteriorLinear):
            # z depends on x_0 from the start, by means of unit scale and little noise: noise is soon learned to be
            # ignored.
            means = torch.randn_like(module.weight.chunk(2)[0]) * module.in_features**-0.5
            init.copy_(module.weight, torch.cat([means, torch.zeros_like(means)]))
            init.copy_(module.bias, torch.tensor([0.0, -3.0]).repeat_interleave(len(means)))
        elif isinstance(module, VMDGroupBias):
            heads, groupings = module.weight.shape
            favourite = torch.arange(heads)[:, None] % (groupings + 1) == torch.arange(groupings)
            init.copy_(module.weight, 4.0 * favourite)  # e^4 times the weight of what is in no common group
        elif isinstance(module, VMDChainTables):
            # Emissions differ little between states: training starts near the model without a chain. What breaks the
            # symmetry soon is that states depend much on one another (with a deviation of 0.5 little is learned for
            # hundreds of updates), and large state vectors.
            init.normal_(module.gaps, std=1.0)
            init.normal_(module.table, std=2.0)
            init.normal_(module.kernels, std=0.05)
            init.normal_(module.state_vectors, std=1.0)
            init.normal_(module.token_vectors, std=0.1 * module.token_vectors.shape[1] ** -0.5)
        elif isinstance(module, VMDUnitLinear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, VMDLatentEncoder):
            init.zeros_(module.kl_warmup_progress)


def is_of_version_0_7(name: str | os.PathLike, **where: Any) -> bool:
    """Whether a folder or Hub id holds a model whose weights have to be converted."""
    try:
        values, _ = VMDConfig.get_config_dict(name, **where)
    except OSError:
        return False  # an adapter, or nothing: transformers says which
    return bool(REMOVED_FIELDS & values.keys() and values["latent_size"])


def convert_weights(state: dict[str, torch.Tensor], config: VMDConfig) -> dict[str, torch.Tensor]:
    """Weights of version 0.7 in the names and shapes of this one: one map from conditioning vectors to the changes of
    all layers has become a map in each layer, without a bias, since the vectors end in a constant."""
    state = dict(state)
    if "kl_warmup_progress" in state:
        state["latent_encoder.kl_warmup_progress"] = state.pop("kl_warmup_progress")
    name = next((name for name in state if name.endswith("modulation.weight") and "layers" not in name), None)
    if name is None:
        return state
    bias = state.pop(name.replace("weight", "bias"))
    prefix = name.removesuffix("modulation.weight")
    maps = torch.cat([state.pop(name), bias[:, None]], dim=1)  # (outputs, conditioning_size + 1)
    if config.backbone_config is not None:
        return state | {name: maps}
    of_layers = 0 if config.latent_input == "position_slices" else config.num_hidden_layers * 6 * config.hidden_size
    layers = maps[:of_layers].chunk(config.num_hidden_layers) if of_layers else ()
    for index, part in enumerate(layers):
        state[f"{prefix}layers.{index}.modulation.weight"] = part.contiguous()
    if config.latent_input != "layers":
        state[f"{prefix}position_inputs.weight"] = maps[of_layers:].contiguous()
    return state


@contextmanager
def saved_with_code(model: VMDPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
    """Within it, saving the model saves its code, too, and names it in the config, and the tokenizer, if given. (Not
    always: or every checkpoint of a training run would copy the code.)"""
    from .modeling_vmd import VMDForMaskedDiffusion, VMDModel  # which need this module

    tokenizer_before = model._tokenizer_to_save
    classes = ((VMDConfig, "AutoConfig"), (VMDModel, "AutoModel"), (VMDForMaskedDiffusion, "AutoModelForMaskedLM"))
    before = [cls._auto_class for cls, _ in classes]
    config, names = model.config, ("auto_map", "custom_pipelines")
    attributes = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        model._tokenizer_to_save = tokenizer or tokenizer_before
        for cls, auto_class in classes:
            cls.register_for_auto_class(auto_class)
        config.auto_map = {"AutoModel": f"{VMDModel.__module__.rpartition('.')[2]}.{VMDModel.__name__}"}
        pipeline = {"impl": "pipeline_vmd.MaskedDiffusionPipeline", "pt": ["AutoModelForMaskedLM"]}
        config.custom_pipelines = {"masked-diffusion": pipeline}
        yield
    finally:
        model._tokenizer_to_save = tokenizer_before
        for (cls, _), auto_class in zip(classes, before, strict=True):
            cls._auto_class = auto_class
        for name in names:
            config.__dict__.pop(name, None)
        config.__dict__.update(attributes)


__all__ = ["VMDPreTrainedModel", "convert_weights", "saved_with_code"]
