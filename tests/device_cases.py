"""Training, generation and bounds on a device that is not the CPU (see `fake_device`)."""

import pytest
import torch
from helpers import MASK, digits, padded_batch, seeded, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from vmd_hf import nelbo
from vmd_hf.pipeline_vmd import MaskedDiffusionPipeline

fake_device = pytest.importorskip("fake_device", reason="this torch knows no devices written in Python")

KINDS = {
    "whole": {},
    "no latent": {"latent_size": 0},
    "blocks": {"block_size": 3, "max_position_embeddings": 24},
    "learned prior": {"block_size": 3, "prior": "learned", "max_position_embeddings": 24},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def models(kind, **changes):
    """The same model on the CPU and on the device."""
    pair = [tiny_model(**(KINDS[kind] | changes)) for _ in range(2)]
    pair[1].to(fake_device.DEVICE).tie_weights()  # as for any device whose tensors are of another type, new parameters
    return pair


def partly_masked():
    x = digits(3, 9)
    x[:, 2:] = MASK
    x[0, 4] = 1
    return x


def digit_tokenizer():
    words = [*"0123456789", "[MASK]", "[PAD]"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]")


def assert_on_device(tensor):
    assert tensor.device.type == fake_device.DEVICE.type


def test_what_an_accelerator_refuses_is_refused_and_what_it_waits_for_is_counted():
    here, there = torch.arange(4.0), torch.arange(4.0).to(fake_device.DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, here])
    with pytest.raises(RuntimeError, match=r"indices|same device"):
        here[there.long()]
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=fake_device.DEVICE, generator=seeded(0))
    view = there.view(2, 2)[1]
    view += 1
    assert there[torch.tensor([2, 3])].tolist() == [3.0, 4.0] and (there * torch.tensor(2.0))[0] == 0
    with fake_device.synchronisations() as count:
        there.sum().item(), there.tolist(), bool(there.any()), there.nonzero(), there[there > 1], there.cpu()
        there.to(fake_device.DEVICE), there[1:], torch.where(there > 1, there, 0.0), there.argsort().cumsum(0)
    assert count.total() == 6


@pytest.mark.parametrize(
    "kind, objective", zip(KINDS, ["vmd", "per_step", "per_sample", "per_step"], strict=True), ids=list(KINDS)
)
def test_training_on_the_device_is_training_on_the_cpu(kind, objective):
    weights, losses = [], []
    input_ids, attention_mask = padded_batch()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    for model in models(kind, objective=objective, kl_warmup_steps=4):
        model.train()
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch = {name: value.to(model.device) for name, value in batch.items()}
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-2, eps=1e-2
        )  # no signs of gradients that are but noise
        torch.manual_seed(0)
        for _ in range(2):
            loss = model(**batch, num_items_in_batch=10).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        weights.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@every_kind
def test_evaluation_on_the_device(kind):
    input_ids, attention_mask = padded_batch()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    losses = [
        model(*(part.to(model.device) for part in (input_ids, attention_mask)), labels=labels.to(model.device)).loss
        for model in models(kind)
    ]
    assert_on_device(losses[1])
    torch.testing.assert_close(losses[1].cpu(), losses[0])


SETTINGS = {
    "argmax": {"num_steps": 2},
    "sampling": {"num_steps": 2, "do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9},
    "random order": {"num_steps": 3, "remasking": "random", "do_sample": True},
    "fresh latents": {"num_steps": 3, "resample_latents": True},
    "threshold": {"num_steps": 4, "confidence_threshold": 0.3},
    "corrector": {"num_steps": 4, "corrector": "cap", "corrector_strength": 0.5},
    "guidance": {"num_steps": 2, "guidance_scale": 1.5},
    "no cache": {"num_steps": 2, "use_cache": False},
    "static cache": {"num_steps": 2, "cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", ["whole", "learned prior"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_generate_takes_inputs_and_generators_of_the_cpu(kind, settings):
    for of_rows in (False, True):
        results = []
        for model in models(kind):
            generator = [seeded(row) for row in range(3)] if of_rows else seeded(0)
            results.append(
                model.generate(
                    partly_masked(), generator=generator, return_dict_in_generate=True, **SETTINGS[settings]
                )
            )
        assert_on_device(results[1].sequences)
        assert torch.equal(results[1].sequences.cpu(), results[0].sequences)
        assert torch.equal(results[1].num_forward_passes.cpu(), results[0].num_forward_passes)


@every_kind
@pytest.mark.parametrize("settings", ["argmax", "sampling"])
def test_a_step_of_generation_waits_for_nothing(kind, settings):
    """Whatever the host waits for is at the beginning and the end of a call, and of a block."""
    _, model = models(kind)
    input_ids = torch.full((3, 9), MASK, device=fake_device.DEVICE)
    waits = []
    for num_steps in (1, 3):
        with fake_device.synchronisations() as count:
            model.generate(input_ids, **(SETTINGS[settings] | {"num_steps": num_steps}))
        waits.append(count.copy())
    assert waits[1] == waits[0]


@every_kind
def test_generate_continues_prompts_of_the_cpu(kind):
    input_ids, attention_mask = padded_batch()
    given = {} if kind == "no latent" else {"latents": torch.ones((2, 4) if kind == "whole" else (2, 3, 4))}
    results = [
        model.generate(input_ids, attention_mask, max_new_tokens=6, num_steps=2, eos_token_id=3, **given)
        for model in models(kind)
    ]
    assert torch.equal(results[1].cpu(), results[0])


@pytest.mark.parametrize("bound", ["per_sample", "per_step"])
@pytest.mark.parametrize("kind", ["whole", "learned prior"])
def test_bounds_take_inputs_of_the_cpu(kind, bound):
    input_ids, attention_mask = padded_batch()
    for of_rows in (False, True):
        bounds = []
        for model in models(kind):
            generator = [seeded(row) for row in range(2)] if of_rows else seeded(0)
            settings = {"bound": bound, "num_steps": 2, "num_samples": 2, "num_orders": 2, "generator": generator}
            bounds.append(nelbo(model, input_ids, attention_mask=attention_mask, **settings))
        assert_on_device(bounds[1].nelbo)
        torch.testing.assert_close(bounds[1].nelbo.cpu(), bounds[0].nelbo, rtol=1e-5, atol=1e-5)


def test_the_pipeline_fills_text_on_the_device(tmp_path):
    tokenizer = digit_tokenizer()
    results = []
    for model in models("whole"):
        pipe = MaskedDiffusionPipeline(model=model, tokenizer=tokenizer, device=model.device)
        results.append(pipe(["1 [MASK] 3", "4 [MASK] [MASK] 7"], num_steps=2, seed=0, return_history=True))
        assert pipe.model.device.type == model.device.type
    assert [text["generated_text"] for text in results[1]] == [text["generated_text"] for text in results[0]]
    assert [text["history"] for text in results[1]] == [text["history"] for text in results[0]]
