"""Variational Masked Diffusion language models for the Hugging Face ecosystem (arXiv 2510.23606).

Importing this package makes `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` know the model type "vmd", and
`pipeline` the task "masked-diffusion". That takes torch and the classes themselves, so nothing here is lazy but
`metrics`, which imports `evaluate` when a metric is loaded, and the command `vmd-hf` starts outside the package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from . import metrics
from .configuration_vmd import VMDConfig
from .generation_vmd import VMDGenerateOutput, VMDGenerationConfig
from .likelihood import CorpusBound, NELBOOutput, corpus_bound, nelbo
from .modeling_vmd import VMDForMaskedDiffusion, VMDMaskedDiffusionOutput, VMDModel, VMDPreTrainedModel
from .pipeline_vmd import TASK, MaskedDiffusionPipeline

__version__ = "0.10.0"

AutoConfig.register(VMDConfig.model_type, VMDConfig)
AutoModel.register(VMDConfig, VMDModel)
AutoModelForMaskedLM.register(VMDConfig, VMDForMaskedDiffusion)
PIPELINE_REGISTRY.register_pipeline(TASK, MaskedDiffusionPipeline, pt_model=AutoModelForMaskedLM, type="text")

__all__ = [
    "CorpusBound",
    "MaskedDiffusionPipeline",
    "NELBOOutput",
    "VMDConfig",
    "VMDForMaskedDiffusion",
    "VMDGenerateOutput",
    "VMDGenerationConfig",
    "VMDMaskedDiffusionOutput",
    "VMDModel",
    "VMDPreTrainedModel",
    "corpus_bound",
    "metrics",
    "nelbo",
]
