"""What other libraries do with a model: export it, quantise it, keep its weights elsewhere, compute it twice."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import MASK, digits, randomise, seeded, tiny_config, tiny_model
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from vmd_hf import VMDForMaskedDiffusion

KINDS = {
    "whole": {},
    "no latent": {"latent_size": 0},
    "blocks without latent": {"block_size": 4, "latent_size": 0},
    "learned prior": {"block_size": 4, "prior": "learned"},
    "chain": {"block_size": 4, "latent_type": "chain", "latent_size": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
exported_kinds = pytest.mark.parametrize("kind", ["whole", "learned prior", "chain"])


def partly_masked():
    input_ids = digits(2, 8)
    input_ids[:, 5:] = MASK
    return input_ids


def assert_generates_alike(model, other, **settings):
    samples = [each.generate(partly_masked(), num_steps=2, generator=seeded(1)) for each in (model, other)]
    assert torch.equal(*samples)


@every_kind
def test_weights_may_be_given_without_a_name(kind):
    model = tiny_model(**KINDS[kind])
    other = VMDForMaskedDiffusion.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    """With dropout, whose noise is drawn again as it was."""
    gradients, num_calls, input_ids = [], [], digits(3, 8)
    for checkpointing in (False, True):
        model, calls = randomise(VMDForMaskedDiffusion(tiny_config(hidden_dropout=0.1, **KINDS[kind]))).train(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        num_calls.append(len(calls))
    assert num_calls[1] == 2 * num_calls[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["whole", "chain"])
def test_the_loss_is_compiled_as_one_graph(kind):
    """Labels are checked without a break. (That of `nonzero` goes where torch is told to capture its shape.)"""
    model, input_ids = tiny_model(num_hidden_layers=1, **KINDS[kind]).train(), digits(3, 8)
    torch.manual_seed(0)
    expected = model(input_ids=input_ids, labels=input_ids).loss
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.manual_seed(0)
        loss = torch.compile(model, fullgraph=True, backend="eager")(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("with_labels", [False, True])
def test_hidden_states_keep_their_gradients(with_labels):
    input_ids = digits(2, 8)
    labels = {"labels": input_ids} if with_labels else {}
    outputs = tiny_model()(input_ids=input_ids, output_hidden_states=True, **labels)
    for state in outputs.hidden_states:
        state.retain_grad()
    (outputs.loss if with_labels else outputs.logits[..., 0].sum()).backward()
    for state in outputs.hidden_states:
        assert state.grad.abs().max() > 0


@every_kind
def test_linear_layers_may_be_quantised_dynamically(kind):
    model = tiny_model(**KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own way, deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    logits = [each(input_ids=partly_masked()).logits.softmax(-1) for each in (model, quantised)]
    assert (logits[0] - logits[1]).abs().mean() < 0.05
    assert not (quantised.generate(partly_masked(), num_steps=2) == MASK).any()


BACKBONES = {
    "causal_lm": {"block_size": 4, "latent_size": 3},
    "causal_lm without latent": {"block_size": 4, "latent_size": 0},
    "masked_lm": {"latent_size": 4},
    "masked_lm in blocks": {"block_size": 4, "latent_type": "chain", "latent_size": 3},
}


def model_around(kind):
    """A language model of transformers as the denoiser."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": None}
    if kind.startswith("causal_lm"):
        around, language_model = VMDForMaskedDiffusion.from_causal_lm, LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        around, language_model = VMDForMaskedDiffusion.from_masked_lm, BertForMaskedLM(BertConfig(**sizes))
    return randomise(around(language_model, mask_token_id=MASK, **BACKBONES[kind])).eval()


@pytest.mark.parametrize("kind", ["whole", "learned prior", "chain", *BACKBONES])
def test_checkpoints_of_torchao_load(kind, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = model_around(kind) if kind in BACKBONES else tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path / "whole")
    quantised = VMDForMaskedDiffusion.from_pretrained(
        tmp_path / "whole", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    quantised.save_pretrained(tmp_path / "quantised")
    loaded = VMDForMaskedDiffusion.from_pretrained(tmp_path / "quantised")
    logits = [each(input_ids=partly_masked()).logits for each in (loaded, quantised, model)]
    torch.testing.assert_close(*logits[:2])
    assert (logits[1].softmax(-1) - logits[2].softmax(-1)).abs().mean() < 0.05
    assert not torch.equal(*logits[1:])  # something is quantised
    assert_generates_alike(loaded, quantised)


@pytest.mark.parametrize(("kind", "layer"), [("causal_lm", "LlamaDecoderLayer"), ("masked_lm in blocks", "BertLayer")])
def test_what_is_kept_in_one_piece_is_there_and_holds_no_token_embeddings(kind, layer):
    """Of BERT transformers names the embeddings, too, whose tokens are read by themselves."""
    assert model_around(kind)._no_split_modules == {layer}
    assert tiny_model()._no_split_modules == {"VMDLayer"}


@every_kind
def test_an_offloaded_model_generates(kind, tmp_path):
    for offload in (cpu_offload, partial(disk_offload, offload_dir=tmp_path)):
        offloaded = tiny_model(**KINDS[kind])
        offload(offloaded, execution_device="cpu")
        assert offloaded.device.type == "meta"
        assert_generates_alike(offloaded, tiny_model(**KINDS[kind]))


def test_a_model_on_disk_generates(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    on_disk = VMDForMaskedDiffusion.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "20KB"}, offload_folder=tmp_path / "offloaded"
    )
    assert on_disk.device.type == "meta"
    assert_generates_alike(on_disk, model)


def example(batch_size, length):
    input_ids = digits(batch_size, length, seed=length)
    input_ids[:, 1::2] = MASK
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


DYNAMIC = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in ("input_ids", "attention_mask")}


@exported_kinds
def test_an_exported_program_takes_other_batches_and_lengths(kind):
    model = tiny_model(**KINDS[kind])
    program = torch.export.export(model, (), example(2, 12), dynamic_shapes=DYNAMIC).module()
    with torch.no_grad():
        torch.testing.assert_close(program(**example(3, 16)).logits, model(**example(3, 16)).logits)


@exported_kinds
def test_onnx_takes_other_batches_and_lengths(kind):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = tiny_model(**KINDS[kind])
    program = torch.onnx.export(
        model, (), kwargs=example(2, 12), dynamic_shapes=DYNAMIC, dynamo=True, verbose=False, optimize=False
    )
    inputs = {name: value.numpy() for name, value in example(3, 16).items()}
    (logits, *_) = reference.ReferenceEvaluator(program.model_proto).run(None, inputs)
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(**example(3, 16)).logits.numpy(), rtol=1e-4, atol=1e-4)


@exported_kinds
@pytest.mark.parametrize("name", ["Dynamo", "Onnx"])
def test_the_exporters_of_transformers_export_the_denoiser(kind, name):
    exporters = pytest.importorskip("transformers.exporters")
    configs = pytest.importorskip("transformers.exporters.configs")
    if name == "Onnx":
        pytest.importorskip("onnxscript")
    exporter, config = getattr(exporters, f"{name}Exporter")(), getattr(configs, f"{name}Config")(dynamic=True)
    assert exporter.export(tiny_model(**KINDS[kind]).model, example(2, 12), config) is not None
