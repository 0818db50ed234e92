"""Trainings that tests compare between one process and several: `train` in a test, this file under `accelerate`.

    accelerate launch --config_file CONFIG tests/distributed_worker.py JOBS.json RESULTS.json

runs the jobs of a list, each the keyword arguments of `train`, or `{"argv": [...]}` for `train_vmd.py`, or
`{"losses_of_processes": FOLDER}`, or `{"split": [FOLDER, FOLDER]}` for `take_a_step` by tensor parallelism, and writes
what they returned.
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, default_data_collator
from transformers.distributed import DistributedConfig

from vmd_hf import VMDConfig, VMDForMaskedDiffusion
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.training import EMACallback, FiniteGradientsCallback, SeededNoiseCallback, VMDMetricsCallback, metrics

TOKENIZER = synthetic_tokenizer()


def rows(number: int, seed: int) -> Dataset:
    """Rows of one to six tokens, so that batches are padded, and processes have unequal numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (number,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(10, (length,), generator=generator).tolist() for length in lengths]}
    )


def build(**changes) -> VMDForMaskedDiffusion:
    """A small model in which, unlike in a new one, the latent has an effect."""
    settings = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 6,
        "position_embedding_type": "learned",
        "latent_size": 4,
        "conditioning_size": 8,
        "kl_warmup_steps": 4,
        "mask_token_id": TOKENIZER.mask_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
    }
    model = VMDForMaskedDiffusion(VMDConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def train(
    folder: str,
    model: dict | None = None,
    num_rows: int = 40,
    num_eval_rows: int = 12,
    batch_size: int = 8,
    eval_batch_size: int = 4,
    ema: bool = True,
    resume: str | None = None,
    sharded: bool = False,
    spoiled_rank: int | None = None,
    **arguments,
) -> dict:
    """A training with `batch_size` rows a step over all processes; the model is saved in `folder`.

    Returns how the model was wrapped, the log, the warnings, and what the model generates and predicts for five rows
    afterwards; with a `spoiled_rank`, whose loss is NaN in the second step, the error.
    """
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT"
    args = TrainingArguments(folder, **(settings | arguments))
    args.per_device_train_batch_size = batch_size // (args.world_size * args.gradient_accumulation_steps)
    args.per_device_eval_batch_size = eval_batch_size // args.world_size
    shard_on_cpu()
    first_window, metrics.FIRST_WINDOW = metrics.FIRST_WINDOW, 2  # so that six steps are enough for a warning
    warnings = Messages()
    metrics.logger.addHandler(warnings)
    callbacks = [VMDMetricsCallback(), SeededNoiseCallback(), FiniteGradientsCallback()]
    if ema:
        callbacks.append(EMACallback(0.5, checkpoint=resume))
    trainer = Trainer(
        model=build(**(model or {})),
        args=args,
        train_dataset=rows(num_rows, seed=1),
        eval_dataset=rows(num_eval_rows, seed=2),
        data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        processing_class=TOKENIZER,
        callbacks=callbacks,
    )
    torch.rand(1 + args.process_index)  # whatever was drawn before, the noise is the same
    if spoiled_rank == args.process_index:
        trainer.model.register_forward_hook(spoil)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FloatingPointError as error:
        return {"error": str(error)}
    finally:
        metrics.FIRST_WINDOW = first_window
        metrics.logger.removeHandler(warnings)
    result = {"wrapper": type(trainer.model_wrapped).__name__, "log": trainer.state.log_history}
    result["warnings"] = warnings.messages

    ids = torch.full((5, 6), TOKENIZER.mask_token_id)
    ids[:, 0] = torch.arange(5)
    torch.manual_seed(0)
    result["generated"] = trainer.model.generate(ids, num_steps=2).tolist()
    trainer.data_collator = default_data_collator
    logits = trainer.predict(Dataset.from_dict({"input_ids": ids.tolist()})).predictions
    result["logits"] = logits[:, :, :10].tolist()  # mask and pad have -inf
    if sharded:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    return result


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def spoil(module, inputs, output):
    module.calls = getattr(module, "calls", 0) + 1
    if module.calls == 2:
        output.loss = output.loss * torch.nan


def shard_on_cpu() -> None:
    """Accelerate shards models on accelerators only, and goes on with data parallel elsewhere. FSDP2 itself does not
    mind, so accelerate is told that these CPUs are accelerators."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run_script(argv: list[str]) -> dict:
    """`train_vmd.py`, which saves in its own folder."""
    from vmd_hf import recipes, training_run

    model_args, data_args, training_args = recipes.parse(argv)
    assert training_args.world_size == 2
    shard_on_cpu()
    trainer = training_run.train(model_args, data_args, training_args)
    return {"wrapper": type(trainer.model_wrapped).__name__, "log": trainer.state.log_history}


def losses_of_processes(folder: str) -> list[list[float]]:
    """Of three steps of the plain Trainer without callbacks, on rows that are all the same, and weights that stay."""
    args = TrainingArguments(folder, max_steps=3, learning_rate=0.0, use_cpu=True, report_to="none", disable_tqdm=True)
    data = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5, 6]] * 60})
    collator, losses = DataCollatorForLanguageModeling(TOKENIZER, mlm=False), []
    trainer = Trainer(model=build(kl_warmup_steps=0), args=args, train_dataset=data, data_collator=collator)
    trainer.model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    trainer.train()
    return gather_object([losses])


def take_a_step(folder: str, saved: str, **kwargs) -> dict:
    """What a saved model computes, as `kwargs` load it; it is saved again after a step of gradient descent."""
    model = VMDForMaskedDiffusion.from_pretrained(folder, **kwargs)
    clean = torch.arange(18).view(2, 9) % 10
    masked = clean.masked_fill(clean % 2 == 0, TOKENIZER.mask_token_id)
    with torch.no_grad():
        result = {"logits": model(masked).logits[:, :, :10].tolist()}
    torch.manual_seed(0)
    result["generated"] = model.generate(clean[:, :3], max_new_tokens=6, num_steps=2).tolist()
    loss = model.train()(clean, labels=clean).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    model.save_pretrained(saved)
    split = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return result | {"loss": loss.item(), "split": len(split)}


def run(job: dict) -> dict | list:
    if "split" in job:
        return take_a_step(*job["split"], distributed_config=DistributedConfig(tp_plan="auto"))
    if "argv" in job:
        return run_script(**job)
    return losses_of_processes(*job.values()) if "losses_of_processes" in job else train(**job)


def main(jobs: str, results: str) -> None:
    torch.set_num_threads(1)
    returned = [run(job) for job in json.loads(Path(jobs).read_text())]
    state = PartialState()
    if state.is_main_process:
        Path(results).write_text(json.dumps(returned))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
