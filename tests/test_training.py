import copy
import gc
import logging
import math
import pickle

import pytest
import torch
from datasets import Dataset
from helpers import tiny_config
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from vmd_hf import VMDForMaskedDiffusion
from vmd_hf.data.synthetic import synthetic_dataset, synthetic_tokenizer
from vmd_hf.training import EMACallback, VMDMetricsCallback, metrics
from vmd_hf.training.learning import unigram_entropy

TOKENIZER = synthetic_tokenizer()
COLLATOR = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
ROWS = synthetic_dataset("d1", 40, seed=0)  # five batches of eight
HELD_OUT = synthetic_dataset("d1", 10, seed=1)


def small_model(**changes):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4}
    return VMDForMaskedDiffusion(tiny_config(**sizes | {"position_embedding_type": "learned"} | changes))


def randomised(model, std=0.3):
    """At initialisation the latent has no effect yet; with these weights everything has one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def make_trainer(
    model, folder, callbacks=(), rows=ROWS, held_out=HELD_OUT, collator=COLLATOR, compute_metrics=None, **arguments
):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
    )


def train(model, folder, *args, resume=None, **arguments):
    trainer = make_trainer(model, folder, *args, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(actual[name], value), name


def largest_difference(first, second):
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@torch.no_grad()
def held_out_output(model):
    ids = HELD_OUT["input_ids"][:]
    return model.eval()(input_ids=ids, labels=ids)


def rows_with_noise(num_rows=24):
    """Rows that bring their noise along, with zero, one or two tokens of context."""
    generator = torch.Generator().manual_seed(3)
    ids = synthetic_dataset("d1", num_rows, seed=2)["input_ids"][:]
    context = torch.arange(4) < torch.arange(num_rows)[:, None] % 3
    columns = {
        "input_ids": ids,
        "labels": ids.masked_fill(context, -100),
        "times": 0.1 + 0.9 * torch.rand(num_rows, generator=generator),
        "position_noise": torch.rand(num_rows, 4, generator=generator),
        "latent_noise": torch.randn(num_rows, 4, generator=generator),
    }
    return Dataset.from_dict({name: value.tolist() for name, value in columns.items()}).with_format("torch")


# --- the plain Trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["vmd", "per_sample", "per_step"])
def test_training_beats_guessing_without_a_warning(tmp_path, objective, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "FIRST_WINDOW", 50)
    model = small_model(objective=objective, kl_warmup_steps=120, initializer_range=0.1)
    rows = synthetic_dataset("d1", 3840, seed=0)
    arguments = {"per_device_train_batch_size": 32, "max_steps": 120, "logging_steps": 40, "learning_rate": 3e-3}
    losses = logged(train(model, tmp_path, [VMDMetricsCallback()], rows=rows, **arguments), "loss")
    assert not [record for record in caplog.records if record.name == metrics.logger.name]
    # Guessing costs log 10 nats a token under each objective.
    assert losses[-1] < losses[0]
    assert losses[-1] < 0.75 * math.log(10)


@pytest.mark.parametrize("settings", [{}, {"latent_size": 0}, {"block_size": 2}])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_gives_the_same_number_again_and_for_every_batch_size(tmp_path, settings, batch_size):
    model = randomised(small_model(**settings))
    direct = held_out_output(model)  # all ten rows at once
    trainer = make_trainer(model, tmp_path, [VMDMetricsCallback()], per_device_eval_batch_size=batch_size)
    first, second = trainer.evaluate(), trainer.evaluate()
    for name in ["loss", "reconstruction_loss"] + (["kl", "kl_per_latent"] if model.config.latent_size else []):
        assert first[f"eval_{name}"] == second[f"eval_{name}"], name
        assert first[f"eval_{name}"] == pytest.approx(direct[name].mean().item(), rel=1e-5), name


def test_evaluation_with_metrics_of_ones_own_and_no_logits(tmp_path):
    def count(prediction):
        return {"rows": len(prediction.label_ids)}

    trainer = make_trainer(small_model(), tmp_path, compute_metrics=count)
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 10
    prediction = trainer.predict(HELD_OUT)
    assert prediction.metrics["test_rows"] == 10
    assert prediction.metrics["test_loss"] == metrics["eval_loss"]
    assert prediction.label_ids.tolist() == HELD_OUT["input_ids"][:].tolist()


def test_prediction_without_labels_gives_the_logits(tmp_path):
    model = randomised(small_model())
    ids = HELD_OUT["input_ids"][:]
    ids[:, 1:3] = TOKENIZER.mask_token_id
    rows = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    trainer = make_trainer(model, tmp_path, collator=default_data_collator)
    logits = trainer.predict(rows).predictions
    expected = model.eval()(input_ids=ids).logits.detach()
    torch.testing.assert_close(torch.tensor(logits), expected)


def test_accumulated_batches_train_like_one_batch(tmp_path):
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = randomised(small_model())
        trainer = train(
            model,
            tmp_path,
            [VMDMetricsCallback()],
            rows=rows_with_noise(),
            collator=default_data_collator,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",  # Adam divides rounding errors by gradients that are almost zero
            max_steps=5,
        )
        assert largest_difference(weights(model), weights(randomised(small_model()))) > 1e-3
        figures = {name: logged(trainer, name) for name in ("loss", "reconstruction_loss", "kl", "kl_per_latent")}
        runs.append((weights(model), figures))
    for other_weights, other_figures in runs[1:]:
        assert_equal_weights(other_weights, runs[0][0], rtol=0, atol=1e-5)
        for name, values in runs[0][1].items():
            assert other_figures[name] == pytest.approx(values, rel=1e-4), name


def test_training_in_half_precision(tmp_path):
    losses = [
        logged(train(randomised(small_model(objective="per_step"), 0.1), tmp_path, bf16=bf16), "loss")
        for bf16 in (False, True)
    ]
    assert len(losses[1]) == 4 and all(map(math.isfinite, losses[1]))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert losses[1] != losses[0]


def test_training_compiled(tmp_path):
    plain, compiled = (
        train(randomised(small_model()), tmp_path, [VMDMetricsCallback()], max_steps=2, **arguments)
        for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert logged(compiled, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=1e-5)
    for name in ("loss", "reconstruction_loss", "kl", "kl_per_latent", "active_units"):
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-3), name


def test_training_on_a_stream(tmp_path):
    stream = synthetic_dataset("d1", 100, seed=0).to_iterable_dataset()
    trainer = train(small_model(), tmp_path, rows=stream, max_steps=3)
    assert trainer.state.global_step == 3
    # The first 24 rows of the stream, in its order, are those of a data set that is not shuffled.
    rows = Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in stream.take(24)]})
    again = train(small_model(), tmp_path, rows=rows, max_steps=3, train_sampling_strategy="sequential")
    assert logged(trainer, "loss") == pytest.approx(logged(again, "loss"), rel=1e-6)


def test_label_smoothing_is_an_error(tmp_path):
    trainer = make_trainer(small_model(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.evaluate()


def test_masking_collators_are_an_error(tmp_path):
    trainer = make_trainer(small_model(), tmp_path, collator=DataCollatorForLanguageModeling(TOKENIZER))
    with pytest.raises(ValueError, match="mlm=False"):
        trainer.train()


# --- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulation", "block_size"), [(1, 2), (3, None)])
@pytest.mark.parametrize("objective", ["vmd", "per_sample", "per_step"])
def test_the_parts_of_the_loss_add_up(tmp_path, objective, accumulation, block_size):
    trainer = train(
        randomised(small_model(objective=objective, block_size=block_size)),
        tmp_path,
        [VMDMetricsCallback()],
        max_steps=6,
        logging_steps=2,
        gradient_accumulation_steps=accumulation,
        eval_strategy="steps",
        eval_steps=2,
    )
    for prefix in ("", "eval_"):
        losses = logged(trainer, f"{prefix}loss")
        parts = zip(logged(trainer, f"{prefix}reconstruction_loss"), logged(trainer, f"{prefix}kl"), strict=True)
        assert losses == pytest.approx([reconstruction + kl for reconstruction, kl in parts], rel=1e-5)
        assert len(losses) == 3 and min(logged(trainer, f"{prefix}kl")) > 1e-4


def test_the_weight_of_the_kl_grows_until_the_warm_up_ends(tmp_path):
    model = randomised(small_model(kl_warmup_steps=4, kl_weight=0.5))
    trainer = train(model, tmp_path, [VMDMetricsCallback()], max_steps=6)
    names = ("loss", "reconstruction_loss", "kl")
    parts = zip(*(logged(trainer, name) for name in names), strict=True)
    factors = [(loss - reconstruction) / kl for loss, reconstruction, kl in parts]
    assert 0 < factors[0] < factors[1] < factors[2] < factors[3]
    assert factors[2] < 0.4
    assert factors[3:] == pytest.approx([0.5] * 3, rel=1e-4)
    assert model.latent_encoder.kl_warmup_progress == 6


def test_logged_figures_are_those_of_the_rows(tmp_path):
    model, rows = randomised(small_model()), rows_with_noise(8)
    direct = model.train()(**rows[:])
    trainer = train(
        model,
        tmp_path,
        [VMDMetricsCallback()],
        rows=rows,
        collator=default_data_collator,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for name in ("loss", "reconstruction_loss", "kl"):
        assert logged(trainer, name) == [pytest.approx(getattr(direct, name).item(), rel=1e-5)]
    assert logged(trainer, "kl_per_latent") == [pytest.approx(direct.kl_per_latent.mean().item(), rel=1e-5)]


def test_active_units_are_counted_from_a_learned_prior_and_where_there_is_a_latent(tmp_path):
    model = randomised(
        small_model(block_size=2, prior="learned", objective="per_step", objective_steps=[1, 2], latent_min_tokens=2)
    )
    with torch.no_grad():  # the posterior is N(0, I) everywhere; the prior's means are 0, vary, and are 5
        for linear in (model.latent_encoder.out_proj, model.model.latent_prior.out_proj):
            varies = linear.weight[1].clone()
            linear.weight.zero_()
            linear.bias.zero_()
        linear.weight[1] = varies
        linear.bias[2] = 5
    shift = held_out_output(model).posterior_shift.flatten(0, 1)
    told = shift[:, 2] != 0
    assert 0 < told.sum() < len(told) and (shift[told, 2] == -5).all() and (shift[~told] == 0).all()
    metrics = make_trainer(model, tmp_path, [VMDMetricsCallback()]).evaluate()
    assert metrics["eval_active_units"] == (shift[told].var(0) > 0.01).sum() == 1


def test_active_units_are_the_dimensions_whose_posterior_mean_varies(tmp_path):
    model = randomised(small_model())
    with torch.no_grad():
        model.latent_encoder.out_proj.weight[1] = 0  # these means are the same for every row
        model.latent_encoder.out_proj.weight[3] = 0
        model.latent_encoder.out_proj.bias[3] = 5
    direct = held_out_output(model)
    assert (direct.posterior_shift.var(0, correction=0) > 0.01).tolist() == [True, False, True, False]
    metrics = make_trainer(model, tmp_path, [VMDMetricsCallback()], per_device_eval_batch_size=3).evaluate()
    assert metrics["eval_active_units"] == 2
    assert metrics["eval_kl_per_latent"] == pytest.approx(direct.kl_per_latent.mean().item(), rel=1e-5)


def test_a_model_without_a_latent_logs_no_kl(tmp_path):
    trainer = train(
        small_model(latent_size=0),
        tmp_path,
        [VMDMetricsCallback()],
        eval_strategy="steps",
        eval_steps=2,
    )
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "reconstruction_loss"), rel=1e-5)
    names = {name for entry in trainer.state.log_history for name in entry}
    assert "eval_reconstruction_loss" in names
    assert not [name for name in names if "kl" in name or "active_units" in name]


def test_predictions_do_not_enter_the_figures_of_an_evaluation(tmp_path):
    trainer = make_trainer(randomised(small_model()), tmp_path, [VMDMetricsCallback()])
    before = trainer.evaluate()
    trainer.predict(synthetic_dataset("d2", 30, seed=5))
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_reconstruction_loss", "eval_kl", "eval_kl_per_latent"):
        assert after[name] == before[name], name


def test_one_training_does_not_enter_the_figures_of_the_next(tmp_path):
    trainer = train(randomised(small_model()), tmp_path, [VMDMetricsCallback()], max_steps=3, logging_steps=2)
    trainer.train()  # the third step of the first training was not logged
    parts = zip(logged(trainer, "reconstruction_loss"), logged(trainer, "kl"), strict=True)
    expected = [reconstruction + kl for reconstruction, kl in parts]
    assert logged(trainer, "loss")[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_the_hook_goes_with_its_callback_and_a_copy_of_the_model_shows_nothing(tmp_path):
    model = randomised(small_model())
    trainer = train(model, tmp_path, [VMDMetricsCallback()], max_steps=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        held_out_output(other)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(held_out_output(model).kl.item(), rel=1e-5)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, VMDMetricsCallback)]
    assert len(model._forward_hooks) == 1
    other = small_model()
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=other)  # a search of hyperparameters
    assert not model._forward_hooks and len(other._forward_hooks) == 1
    del trainer, callback
    gc.collect()
    assert not other._forward_hooks


# --- what is said where nothing is learned ---------------------------------------------------------------------------


def test_the_entropy_of_single_tokens():
    counts = torch.tensor([1.0, 1.0, 2.0, 0.0])
    # 1.5 bits in the sample, and (3 - 1) / (2 * 4) for what a sample of four misses.
    assert unigram_entropy(counts) == pytest.approx(1.5 * math.log(2) + 0.25)
    assert unigram_entropy(1e6 * counts) == pytest.approx(1.5 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("objective", ["vmd", "per_sample", "per_step"])
def test_a_model_of_frequencies_has_their_entropy_for_a_loss_under_each_objective(objective):
    torch.manual_seed(0)
    model = small_model(objective=objective, tie_word_embeddings=False).train()
    weights = torch.arange(1.0, 11)
    with torch.no_grad():  # every hidden state is the same, and the logits are log-frequencies
        for parameter in model.model.parameters():
            parameter.zero_()
        model.model.embeddings.embed_positions.weight[:, 0] = 1
        model.model.norm.weight.fill_(1)
        hidden = model.model(torch.zeros(1, 1, dtype=torch.long), latents=torch.zeros(1, 4)).last_hidden_state[0, 0]
        model.lm_head.weight[:10] = weights.log()[:, None] * hidden / hidden.square().sum()
    ids = torch.multinomial(weights, 4 * 20_000, replacement=True).view(-1, 4)
    loss = model(input_ids=ids, labels=ids).reconstruction_loss.item()
    assert loss == pytest.approx(unigram_entropy(ids.flatten().bincount().float()), rel=0.03)
    frequencies = weights / weights.sum()
    assert loss == pytest.approx(-(frequencies * frequencies.log()).sum().item(), rel=0.03)


def test_windows_are_the_second_halves_of_doubled_times():
    def windows(begin, now):
        window, spans = metrics._Window(begin, now), []
        while window.end < 2000:
            if window.is_second_half():
                spans.append((window.start, window.end))
            window.move_on()
        return spans

    assert windows(0, 0) == [(100, 200), (200, 400), (400, 800), (800, 1600)]
    assert windows(50, 0) == [(150, 250), (250, 450), (450, 850), (850, 1650)]
    assert windows(50, 300) == [(400, 500), (500, 700), (700, 1100), (1100, 1900)]  # resumed


@pytest.mark.parametrize(
    "changes, said, not_said",
    [
        ({"objective": "per_sample"}, ["block_size", "kl_warmup_steps (now 1)"], ["few-step", "rotary"]),
        ({"position_embedding_type": "rotary"}, ["few-step objective", 'position_embedding_type="learned"'], []),
        ({"block_size": 2}, ['prior="learned"'], ["block_size"]),
        ({"latent_size": 0}, ["learning_rate (now at most 0.0)"], ["latent"]),
    ],
)
def test_what_is_not_learned_is_said_with_what_to_try(tmp_path, monkeypatch, caplog, changes, said, not_said):
    monkeypatch.setattr(metrics, "FIRST_WINDOW", 2)
    model = small_model(**({"kl_warmup_steps": 1, "initializer_range": 1.0} | changes))  # much worse than frequencies
    if model.latent_encoder is not None:
        torch.nn.init.zeros_(model.latent_encoder.out_proj.weight)
    arguments = {"learning_rate": 0.0, "max_steps": 10, "warmup_steps": 2, "logging_steps": 3}
    arguments |= {"lr_scheduler_type": "constant_with_warmup", "per_device_train_batch_size": 40}
    train(model, tmp_path, [VMDMetricsCallback()], **arguments)
    messages = [record.getMessage() for record in caplog.records if record.name == metrics.logger.name]
    assert all(record.levelno == logging.WARNING for record in caplog.records if record.name == metrics.logger.name)
    learning = [message for message in messages if "frequencies of tokens" in message]
    latent = [message for message in messages if "encodes nothing" in message]
    assert [message.split(":")[0] for message in learning] == ["step 6", "step 10"]  # 4 and 8 after the warm-up
    assert [message.split(":")[0] for message in latent] == (["step 5", "step 9"] if model.latent_encoder else [])
    entropy = unigram_entropy(10.0 * ROWS["input_ids"][:].flatten().bincount())
    assert f"entropy of single tokens is {entropy:.3f}" in learning[1]
    for words in said:
        assert any(words in message for message in messages), words
    for words in not_said:
        assert not any(words in message for message in messages), words


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_average", [False, True])
@pytest.mark.parametrize("step", [3, 5])  # in the middle of an epoch and at its end
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, with_average, step):
    def run(folder, **arguments):
        callbacks = [VMDMetricsCallback()] + ([EMACallback(decay=0.3)] if with_average else [])
        model = small_model(kl_warmup_steps=100, hidden_dropout=0.1)
        trainer = train(model, folder, callbacks, max_steps=8, save_strategy="steps", save_steps=step, **arguments)
        return weights(model), load_file(folder / "checkpoint-8" / "model.safetensors"), trainer

    expected, expected_file, whole = run(tmp_path)
    training_weights = tmp_path / "checkpoint-8" / "training_weights.safetensors"
    assert training_weights.exists() == with_average
    expected_training = load_file(training_weights) if with_average else {}
    # The rest of the training again, in the same folder, with a model that starts elsewhere.
    actual, actual_file, resumed = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
    assert_equal_weights(actual, expected)
    assert_equal_weights(actual_file, expected_file)
    assert_equal_weights(load_file(training_weights) if with_average else {}, expected_training)
    assert actual["latent_encoder.kl_warmup_progress"] == 8
    assert logged(resumed, "kl") == logged(whole, "kl")


# --- the average of the weights --------------------------------------------------------------------------------------


class WeightsAfterEachStep(TrainerCallback):
    """Copies of the trained weights after every optimizer step, and the averages that belong to them."""

    def __init__(self, decay):
        self.decay = decay
        self.trained = []
        self.averages = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.trained.append(trained)
        if not self.averages:
            self.averages.append(trained)
            return
        average, num_averaged = self.averages[-1], len(self.averages)
        decay = min(self.decay, (1 + num_averaged) / (10 + num_averaged))  # 0.3 from the fourth on
        self.averages.append({name: decay * average[name] + (1 - decay) * value for name, value in trained.items()})


def parameters(model):
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    "arguments, steps",
    [({"save_strategy": "steps", "save_steps": 2, "eval_steps": 2}, (2, 4, 6)), ({"save_strategy": "epoch"}, (3, 6))],
)
def test_checkpoints_hold_the_average_and_the_trained_weights_lie_beside_it(tmp_path, arguments, steps):
    model, spy = small_model(), WeightsAfterEachStep(decay=0.3)
    rows = synthetic_dataset("d1", 24, seed=0)
    trainer = train(
        model,
        tmp_path,
        [VMDMetricsCallback(), EMACallback(decay=0.3), spy],
        rows=rows,
        max_steps=6,
        eval_strategy=arguments["save_strategy"],
        **arguments,
    )
    assert len(spy.averages) == 6
    assert_equal_weights(parameters(model), spy.averages[-1], rtol=1e-5, atol=1e-6)
    assert largest_difference(spy.averages[-1], spy.trained[-1]) > 1e-3
    for step in steps:
        folder = tmp_path / f"checkpoint-{step}"
        saved = VMDForMaskedDiffusion.from_pretrained(folder)
        assert_equal_weights(parameters(saved), spy.averages[step - 1], rtol=1e-5, atol=1e-6)
        assert_equal_weights(load_file(folder / "training_weights.safetensors"), spy.trained[step - 1])
        # The metrics beside a checkpoint are those of the weights in it.
        (evaluation,) = [e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e]
        assert evaluation["eval_loss"] == pytest.approx(held_out_output(saved).loss.item(), rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in steps}
    assert not list(tmp_path.rglob("*.partial"))


def test_the_average_is_evaluated_and_does_not_touch_the_training(tmp_path):
    plain, spy = small_model(), WeightsAfterEachStep(decay=0.3)
    arguments = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}  # and nothing is saved
    train(plain, tmp_path, **arguments)
    trainer = train(small_model(), tmp_path, [EMACallback(decay=0.3), spy], **arguments)
    assert_equal_weights(spy.trained[-1], parameters(plain))
    for step, loss in zip((2, 4), logged(trainer, "eval_loss"), strict=False):
        model = small_model()
        model.load_state_dict(spy.averages[step - 1], strict=False)
        assert loss == pytest.approx(held_out_output(model).loss.item(), rel=1e-5)
        model.load_state_dict(spy.trained[step - 1], strict=False)
        assert loss != pytest.approx(held_out_output(model).loss.item(), rel=1e-4)


def test_the_best_checkpoint_is_loaded_with_its_average(tmp_path):
    best_steps = []
    for greater_is_better in (False, True):  # one of the two is best before the end
        model, folder = small_model(), tmp_path / str(greater_is_better)
        trainer = train(
            model,
            folder,
            [EMACallback(decay=0.5)],
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=greater_is_better,
        )
        losses = dict(zip((2, 4, 6), logged(trainer, "eval_loss"), strict=True))
        best = (max if greater_is_better else min)(losses, key=losses.get)
        assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
        saved = VMDForMaskedDiffusion.from_pretrained(folder / f"checkpoint-{best}")
        assert_equal_weights(weights(model), weights(saved))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
        best_steps.append(best)
    assert best_steps != [6, 6]


def test_a_checkpoint_of_another_folder_is_resumed_when_it_is_named(tmp_path):
    def run(folder, checkpoint=None, **arguments):
        model = small_model()
        callbacks = [EMACallback(decay=0.3, checkpoint=checkpoint)]
        train(model, folder, callbacks, save_strategy="steps", save_steps=2, **arguments)
        return weights(model)

    expected = run(tmp_path / "first")
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    assert_equal_weights(run(tmp_path / "second", checkpoint, resume=checkpoint), expected)
    with pytest.raises(FileNotFoundError, match=r"training_weights\.safetensors"):
        run(tmp_path / "third", resume=checkpoint)


def test_a_checkpoint_without_the_average_cannot_be_resumed_with_it(tmp_path):
    train(small_model(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(FileNotFoundError, match=r"training_weights\.safetensors.*saved without"):
        train(small_model(), tmp_path, [EMACallback()], resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match="decay"):
        EMACallback(decay=decay)
