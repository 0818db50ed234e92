import math

import evaluate
import pytest
import torch
from helpers import MASK, PAD, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vmd_hf import metrics
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.likelihood import nelbo

BOARD = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@pytest.mark.parametrize("name", metrics.NAMES)
def test_every_metric_loads_from_its_file_and_describes_itself(name):
    metric = metrics.load(name)
    assert isinstance(metric, evaluate.Metric)
    assert len(metric.description) > 100 and "Args:" in metric.inputs_description and "title=" in metric.citation


def test_an_unknown_metric_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match=r"sudoku_validity.*got 'bleu'"):
        metrics.load("bleu")


def test_joint_distribution_by_hand():
    rows = [[k, (k + 1) % 10] for k in range(10)] * 3 + [[0, 5]] * 10
    result = metrics.load("joint_distribution").compute(predictions=rows, setting="two_token_deterministic")
    assert result["accuracy"] == pytest.approx(0.75)
    assert result["kl"] == pytest.approx(math.log(0.1 / 0.075))


def test_joint_distribution_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match=r"must have 4 tokens each for d1, got \[2\]"):
        metrics.load("joint_distribution").compute(predictions=[[1, 2]], setting="d1")


def test_sudoku_validity_by_hand():
    wrong_clue = BOARD.translate(str.maketrans("12", "21"))  # valid, but not this puzzle's
    broken = "55" + BOARD[2:]  # a row, a column; the box, too
    result = metrics.load("sudoku_validity").compute(
        predictions=[BOARD, BOARD, wrong_clue, broken], references=[PUZZLE, "." * 81, PUZZLE, "." * 81]
    )
    assert result["valid"] == 0.75 and result["solved"] == 0.5 and result["kept_clues"] == 0.75
    assert result["distinct"] == 3
    assert result["valid_rows"] == pytest.approx(35 / 36)
    assert result["valid_columns"] == pytest.approx(35 / 36)
    assert result["valid_boxes"] == pytest.approx(35 / 36)


def digit_model(**changes):
    tokenizer = synthetic_tokenizer()
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (MASK, PAD)
    return tiny_model(max_position_embeddings=16, **changes), tokenizer


def test_the_bound_of_a_metric_is_that_of_nelbo_wrapped_by_peft_or_not():
    model, tokenizer = digit_model()
    texts = ["1234", "90", "5"]
    metric = metrics.load("likelihood_bound")
    result = metric.compute(predictions=texts, model=model, tokenizer=tokenizer, num_steps=2, batch_size=2)
    expected = 0.0
    generator = torch.Generator().manual_seed(0)
    for rows in (texts[:2], texts[2:]):
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = nelbo(model, batch["input_ids"], labels, batch["attention_mask"], num_steps=2, generator=generator)
        expected += output.nelbo.sum().item()
    assert result["bits_per_character"] == pytest.approx(expected / math.log(2) / 7, rel=1e-5)
    assert result["perplexity_bound"] == pytest.approx(math.exp(expected / 7), rel=1e-5)
    assert result["num_characters"] == result["num_tokens"] == 7 and result["standard_error"] > 0
    wrapped = get_peft_model(model, LoraConfig())
    again = metric.compute(predictions=texts, model=wrapped, tokenizer=tokenizer, num_steps=2, batch_size=2)
    assert again["bits_per_character"] == pytest.approx(result["bits_per_character"], rel=1e-6)


def test_the_order_of_a_metric_is_that_of_nelbo():
    model, tokenizer = digit_model(latent_type="chain")
    metric, output = (
        metrics.load("likelihood_bound"),
        nelbo(model, torch.arange(8)[None], num_steps=3, order="entropy"),
    )
    settings = {"predictions": ["01234567"], "model": model, "tokenizer": tokenizer, "num_steps": 3}
    result = metric.compute(**settings, order="entropy")
    assert result["bits_per_token"] == pytest.approx(output.nelbo.item() / 8 / math.log(2), rel=1e-5)
    assert result["order"] == "entropy" != metric.compute(**settings)["order"]


def test_the_bound_of_a_text_is_that_of_its_own_tokens():
    """Those that a tokenizer adds are context: they say nothing, and no character is theirs."""
    model, tokenizer = digit_model()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="9 $A 8", special_tokens=[("9", 9), ("8", 8)])
    assert tokenizer("12")["input_ids"] == [9, 1, 2, 8]
    result = metrics.load("likelihood_bound").compute(
        predictions=["12"], model=model, tokenizer=tokenizer, num_steps=1
    )
    ids = torch.tensor([[9, 1, 2, 8]])
    labels = ids.masked_fill(torch.tensor([[True, False, False, True]]), -100)
    output = nelbo(model, ids, labels, num_steps=1, generator=torch.Generator().manual_seed(0))
    assert result["num_tokens"] == result["num_characters"] == 2
    assert result["bits_per_character"] == pytest.approx(output.nelbo.item() / 2 / math.log(2), rel=1e-5)
    tokenizer._tokenizer.normalizer = Strip()
    with pytest.raises(ValueError, match="a token of their own each"):
        metrics.load("likelihood_bound").compute(predictions=["12", " "], model=model, tokenizer=tokenizer)


def test_a_name_in_place_of_a_model_is_an_error():
    with pytest.raises(ValueError, match="model must be the model itself, got 'vmd'"):
        metrics.load("likelihood_bound").compute(predictions=["1"], model="vmd", tokenizer=synthetic_tokenizer())


def test_an_empty_text_has_no_bound():
    model, tokenizer = digit_model()
    with pytest.raises(ValueError, match="at least one character"):
        metrics.load("likelihood_bound").compute(predictions=["1", ""], model=model, tokenizer=tokenizer)


def test_words_by_hand():
    result = metrics.load("text_quality").compute(predictions=["a b a b", "a c"], words=["a", "b"])
    assert result["distinct_1"] == pytest.approx(3 / 6)
    assert result["distinct_2"] == pytest.approx(3 / 4)  # ab ba ab, ac
    assert result["distinct_3"] == 1.0
    assert result["unigram_entropy"] == pytest.approx(math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6)
    assert result["known_words"] == pytest.approx(5 / 6)


def test_texts_without_a_word_are_an_error():
    with pytest.raises(ValueError, match="at least one word"):
        metrics.load("text_quality").compute(predictions=["", " "])


def test_a_causal_judge_reads_texts_alone_as_in_a_batch():
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    judge = LlamaForCausalLM(LlamaConfig(vocab_size=12, hidden_size=16, intermediate_size=32, **settings)).eval()
    tokenizer = synthetic_tokenizer()
    texts = ["12345", "678", "90"]
    result = metrics.load("text_quality").compute(
        predictions=texts, judge=judge, judge_tokenizer=tokenizer, batch_size=2
    )
    nats = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probabilities = judge(input_ids=ids).logits.log_softmax(-1)[0]
        nats -= sum(log_probabilities[i, ids[0, i + 1]].item() for i in range(len(text) - 1))
    assert result["judge_perplexity"] == pytest.approx(math.exp(nats / 7), rel=1e-5)


def test_an_autoregressive_model_of_this_package_is_a_judge(tmp_path):
    judge, tokenizer = digit_model(block_size=1, latent_size=0, objective="per_sample", objective_steps=[1])
    judge.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    by_folder = metrics.load("text_quality").compute(predictions=["123", "45"], judge=tmp_path)
    result = metrics.load("text_quality").compute(predictions=["123", "45"], judge=judge, judge_tokenizer=tokenizer)
    assert by_folder == result
    nats = 0.0
    for text in ("123", "45"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for i in range(len(text)):
            x_t = torch.cat([ids[:, :i], torch.tensor([[MASK]])], dim=1)
            with torch.no_grad():
                nats -= judge(input_ids=x_t).logits[0, i].log_softmax(-1)[ids[0, i]].item()
    assert result["judge_perplexity"] == pytest.approx(math.exp(nats / 5), rel=1e-5)
    whole, _ = digit_model()
    with pytest.raises(ValueError, match="judge must be autoregressive"):
        metrics.load("text_quality").compute(predictions=["123"], judge=whole, judge_tokenizer=tokenizer)


def test_a_causal_judge_needs_no_token_for_padding_and_is_loaded_by_its_folder(tmp_path):
    """GPT-2 counts its positions from the first column, and its tokenizer has no pad token."""
    torch.manual_seed(0)
    judge = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    tokenizer = synthetic_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    judge.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["12345", "678", "", "90"]
    result = metrics.load("text_quality").compute(predictions=texts, judge=str(tmp_path))
    nats = 0.0
    for text in filter(None, texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probabilities = judge(input_ids=ids).logits.log_softmax(-1)[0]
        nats -= sum(log_probabilities[i, ids[0, i + 1]].item() for i in range(len(text) - 1))
    assert result["judge_perplexity"] == pytest.approx(math.exp(nats / 7), rel=1e-5)


def test_metrics_of_the_same_predictions_combine():
    combined = evaluate.combine([metrics.load("text_quality"), metrics.load("likelihood_bound")])
    model, tokenizer = digit_model()
    result = combined.compute(predictions=["12", "3"], model=model, tokenizer=tokenizer)
    assert {"distinct_1", "bits_per_character"} <= result.keys()
