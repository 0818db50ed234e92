"""The model `vmd` of lm-evaluation-harness, on tasks whose scores are known before."""

import json
import math
import sys

import lm_eval
import pytest
import torch
import yaml
from helpers import digits, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from test_cli import run
from test_model_cards import CARDS

from vmd_hf import nelbo
from vmd_hf.data.characters import character_tokenizer
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.harness import VMDLM, cut, request_seed, rolling_windows

D1 = str(CARDS / "vmd-d1")
KINDS = [
    {},
    {"objective": "per_sample"},
    {"latent_size": 0},
    {"block_size": 3, "objective": "per_step"},
    {"block_size": 2, "prior": "learned"},
]


def harness(settings=None, **kwargs):
    return VMDLM(tiny_model(**(settings or {})), synthetic_tokenizer(), **kwargs)


def requests(kind, arguments):
    return [Instance(kind, {}, arguments=each, idx=index) for index, each in enumerate(arguments)]


def text(length, seed=0):
    return "".join(map(str, digits(1, length, seed)[0].tolist()))


PAIRS = [(text(context, context), text(length, 99 + length)) for context in (0, 1, 4, 7) for length in (1, 2, 5)]


@pytest.fixture
def tasks(tmp_path):
    """D1 from two digits on. Of ten questions three are marked with a wrong answer; of ten texts that are to stop
    before a 7, eight have none, that after "45" is "67" and that after "56" is "78"."""
    choices, texts = [], []
    for k in range(10):
        a, b, c, d = ((k + i) % 10 for i in range(4))
        wrong = [f"{d}{c}", f"{a}{b}", f"{c}{c}"]
        right = k % 4
        options = [*wrong[:right], f"{c}{d}", *wrong[right:]]
        choices.append({"given": f"{a}{b}", "options": options, "gold": (right + (k < 3)) % 4})
        texts.append({"given": f"{a}{b}", "answer": {4: "6", 5: ""}.get(k, f"{c}{d}")})
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "given", "target_delimiter": ""}
    written = {
        "d1_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
        "d1_text": {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["7", "\n"], "max_gen_toks": 2},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for (name, task), rows in zip(written.items(), (choices, texts), strict=True):
        path = tmp_path / f"{name}.json"
        path.write_text("\n".join(map(json.dumps, rows)))
        data = {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_kwargs": data} | common | task))
    return tmp_path


def test_tasks_give_the_scores_that_are_known_before(tasks):
    results = lm_eval.simple_evaluate(
        model="vmd",
        model_args={"pretrained": D1, "num_steps": 1},
        tasks=["d1_choice", "d1_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    assert results["results"]["d1_choice"]["acc,none"] == pytest.approx(0.7)
    assert results["results"]["d1_text"]["exact_match,none"] == 1
    for sample in results["samples"]["d1_choice"]:
        scores = [float(answer[0][0]) for answer in sample["resps"]]
        right = sample["doc_id"] % 4
        assert scores[right] > -0.3 and all(s < -3 for i, s in enumerate(scores) if i != right)
        assert [answer[0][1] in (True, "True") for answer in sample["resps"]] == [i == right for i in range(4)]


def test_the_command_runs_tasks_of_a_folder(tasks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vmd-hf"])
    options = ["--model", "vmd", "--model_args", f"pretrained={D1},num_steps=1", "--batch_size", "5"]
    options += ["--tasks", "d1_choice", "--include_path", tasks, "--output_path", tasks / "results"]
    result = run("lm-eval", *options)
    assert result.exit_code == 0, result.output
    (path,) = (tasks / "results").rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["d1_choice"]["acc,none"] == pytest.approx(0.7)
    result = run("lm-eval", "--model", "vmd", "--model_args", f"pretrained={D1},num_steps=0", *options[4:])
    assert result.exit_code == 1 and "num_steps must be" in result.stderr


@pytest.mark.parametrize("settings", KINDS)
def test_neither_batch_nor_order_nor_company_matters(settings):
    alone, together = (harness(settings, num_steps=2, num_orders=2, batch_size=size) for size in (1, 8))
    expected = [alone.loglikelihood(requests("loglikelihood", [pair]), True)[0] for pair in PAIRS]
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(1)).tolist()
    answers = together.loglikelihood(requests("loglikelihood", [PAIRS[i] for i in order]), True)
    # 400 nats, summed in float32 in another order.
    assert [greedy for _, greedy in answers] == [expected[i][1] for i in order]
    assert [score for score, _ in answers] == pytest.approx([expected[i][0] for i in order], rel=1e-5, abs=1e-4)
    texts = [(text(length, length),) for length in (0, 5, 16, 40)]
    rolling = requests("loglikelihood_rolling", texts)
    assert together.loglikelihood_rolling(rolling[::-1], True)[::-1] == pytest.approx(
        [alone.loglikelihood_rolling([request], True)[0] for request in rolling], rel=1e-5, abs=1e-4
    )
    generation = [
        (text(length, length), {"until": [], "max_gen_toks": count, "do_sample": sample})
        for length, count, sample in ((0, 4, True), (3, 4, True), (7, 4, False), (2, 6, False), (5, 6, False))
    ]
    generation = requests("generate_until", generation)
    assert together.generate_until(generation[::-1], True)[::-1] == [
        alone.generate_until([request], True)[0] for request in generation
    ]


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_loglikelihood_is_minus_the_bound(settings, num_samples):
    model = harness(settings, num_steps=3, num_samples=num_samples, seed=5)
    bound = "per_sample" if settings.get("objective") == "per_sample" else "per_step"
    assert model.bound == bound
    for pair in PAIRS:
        context, continuation = ([int(digit) for digit in part] for part in pair)
        output = nelbo(
            model.model,
            torch.tensor([context + continuation]),
            torch.tensor([[-100] * len(context) + continuation]),
            bound=bound,
            num_steps=3,
            num_samples=num_samples,
            generator=torch.Generator().manual_seed(request_seed(5, context or continuation)),
        )
        ((score, _),) = model.loglikelihood(requests("loglikelihood", [pair]), True)
        assert score == pytest.approx(-float(output.nelbo), rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("settings", [{"latent_size": 0}, {"latent_type": "chain", "block_size": 4}])
@pytest.mark.parametrize("order", ["left_to_right", "entropy"])
def test_the_order_of_the_sampler_is_that_of_the_bound(settings, order):
    model = harness(settings, num_steps=3, order=order)
    ((score, _),) = model.loglikelihood(requests("loglikelihood", [("12", "34567")]), True)
    ids = torch.arange(1, 8)[None]
    labels = ids.masked_fill(ids < 3, -100)
    exact = nelbo(model.model, ids, labels, num_steps=3, order=order).nelbo
    assert score == pytest.approx(-float(exact), rel=1e-6)
    generators = (torch.Generator().manual_seed(seed) for seed in range(5))
    others = [nelbo(model.model, ids, labels, num_steps=3, generator=generator).nelbo for generator in generators]
    assert any(score != pytest.approx(-float(other), rel=1e-4) for other in others)


def log_probabilities(model, ids, masked):
    """Sum over the masked positions of log p(token | the other tokens), in one pass of the model."""
    row = torch.tensor([ids])
    x_t = row.clone()
    x_t[0, masked] = model.config.mask_token_id
    with torch.no_grad():
        logits = model(x_t).logits.log_softmax(-1)
    return float(logits[0, masked, row[0, masked]].sum())


def test_without_a_latent_one_step_is_the_sum_of_the_tokens_own_log_probabilities():
    model = harness({"latent_size": 0}, num_steps=1, batch_size=5)
    answers = model.loglikelihood(requests("loglikelihood", PAIRS), True)
    for (context, continuation), (score, greedy) in zip(PAIRS, answers, strict=True):
        ids = [int(digit) for digit in context + continuation]
        masked = list(range(len(context), len(ids)))
        assert score == pytest.approx(log_probabilities(model.model, ids, masked), rel=1e-6, abs=1e-4)
        x_t = torch.tensor([ids])
        x_t[0, masked] = model.model.config.mask_token_id
        assert greedy == (model.model(x_t).logits[0].argmax(-1)[masked].tolist() == ids[len(context) :])
    # Rows of 8 tokens at most: 8, then 7 after one that was scored, then 5 after the 3 before them.
    model.max_length = 8
    ids = [int(digit) for digit in text(20, 3)]
    windows = [(0, 0, 8), (7, 8, 15), (12, 15, 20)]  # first token that is seen, first that is scored, end
    expected = sum(
        log_probabilities(model.model, ids[seen:end], list(range(scored - seen, end - seen)))
        for seen, scored, end in windows
    )
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text(20, 3),)]), True)
    assert total == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_an_autoregressive_model_has_the_loglikelihood_of_the_chain_rule():
    model = harness({"latent_size": 0, "block_size": 1, "objective": "per_sample", "objective_steps": [1]})
    context, continuation = text(3), text(6, 5)
    expected = 0.0
    for end in range(3, 9):
        ids = [int(digit) for digit in (context + continuation)[: end + 1]]
        expected += log_probabilities(model.model, ids, [end])
    greedy = model.generate_until(requests("generate_until", [(context, {"until": [], "max_gen_toks": 6})]), True)[0]
    assert len(greedy) == 6 and greedy != continuation
    pairs = [(context, continuation), (context, greedy)]
    answers = model.loglikelihood(requests("loglikelihood", pairs), True)
    assert answers[0][0] == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert [is_greedy for _, is_greedy in answers] == [False, True]
    model.check_greedy = False
    assert not model.loglikelihood(requests("loglikelihood", pairs), True)[1][1]


def test_every_token_of_a_window_is_scored_once_and_windows_are_no_longer_than_allowed():
    for length in range(12):
        for max_length in range(1, 6):
            ids = list(range(length))
            windows = rolling_windows(ids, max_length)
            assert [token for _, scored in windows for token in scored] == ids
            for index, (context, scored) in enumerate(windows):
                assert scored and context == ids[scored[0] - len(context) : scored[0]]
                assert len(context) + len(scored) == min(max_length, length)
                assert bool(context) == (index > 0 and max_length > 1)


def test_what_is_repeated_is_drawn_anew_and_what_is_compared_shares_its_noise():
    model = harness({"latent_size": 0}, num_steps=1)
    request = ("12", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    first = model.generate_until(requests("generate_until", [request] * 4), True)
    assert len(set(first)) == 4 and first == model.generate_until(requests("generate_until", [request] * 4), True)
    assert harness({"latent_size": 0}, num_steps=1, seed=1).generate_until(
        requests("generate_until", [request]), True
    ) != [first[0]]
    model = harness({"latent_size": 0}, num_steps=2)
    seeds = {request_seed(0, [1, 2], repeat) for repeat in range(5)} | {request_seed(1, [1, 2])}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    calls = []
    model._score = lambda batch, check: [calls.append(row.seed) or (0.0, False) for row in batch]
    model.loglikelihood(requests("loglikelihood", [("12", "345"), ("12", "678"), ("21", "345"), ("", "12")]), True)
    assert calls[0] == calls[1] and len(set(calls)) == 2  # "" and "12": the seed of the only text there is
    model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text(31),)]), True)
    assert len(set(calls[4:])) == 2


def test_texts_are_cut_at_the_first_stop_string():
    assert cut("abcdef", ["ef", "cd"]) == "ab"
    assert cut("abcdef", ["x", ""]) == "abcdef"
    assert cut("abcdef", ["ab"]) == ""


def test_a_text_ends_at_the_token_that_ends_texts():
    model = tiny_model(latent_size=0, vocab_size=13, eos_token_id=12)
    tokenizer = synthetic_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[EOS]"})
    with torch.no_grad():
        model.lm_head.weight[12] = 0
    answer = VMDLM(model, tokenizer).generate_until(
        requests("generate_until", [("1", {"until": "\n", "max_new_tokens": 6})]), True
    )[0]
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=6)[0, 1:].tolist()
    assert answer == "".join(str(i) for i in ids[: ids.index(12) if 12 in ids else None])


def test_a_context_that_is_too_long_loses_its_beginning(caplog):
    model = harness({"latent_size": 0}, num_steps=1, max_length=6)
    long, short = model.loglikelihood(requests("loglikelihood", [("9876543", "21"), ("6543", "21")]), True)
    assert long == pytest.approx(short)
    assert "a context of 7 tokens was cut to its last 4" in caplog.text
    settings = {"until": [], "max_gen_toks": 2}
    answers = model.generate_until(requests("generate_until", [("9876543", settings), ("6543", settings)]), True)
    assert answers[0] == answers[1]


def test_nothing_to_score_has_probability_one():
    model = harness(num_steps=2, batch_size=2)
    answers = model.loglikelihood(requests("loglikelihood", [("", ""), ("12", ""), ("12", "3")]), True)
    assert [score for score, _ in answers[:2]] == [0, 0] and answers[2][0] < 0
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)]), True) == [0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be an integer of at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"max_length": 17}, "max_length must lie between 1 and max_position_embeddings = 16, got 17"),
        ({"max_length": 0}, "max_length must lie between 1"),
        ({"tokenizer": None}, "tokenizer must be given with a model object, got None"),
        ({"tokenizer": character_tokenizer()}, "tokenizer must be the model's, which has 12 tokens"),
        ({"pretrained": "./nowhere"}, "no such folder"),
        ({"pretrained": torch.nn.Linear(1, 1)}, "pretrained must be a VMDForMaskedDiffusion, got Linear"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VMDLM(**({"pretrained": tiny_model(), "tokenizer": synthetic_tokenizer()} | kwargs))


def test_wrong_requests_are_named():
    model = harness(max_length=4)
    with pytest.raises(ValueError, match="continuation must be at most max_length = 4 tokens, got 5"):
        model.loglikelihood(requests("loglikelihood", [("1", "23456")]), True)
    with pytest.raises(ValueError, match="max_gen_toks must be at most max_length = 4 tokens, got 5"):
        model.generate_until(requests("generate_until", [("1", {"until": [], "max_gen_toks": 5})]), True)
    with pytest.raises(ValueError, match="generate knows no argument 'num_beams'"):
        model.generate_until(requests("generate_until", [("1", {"num_beams": 2, "max_gen_toks": 2})]), True)
    with pytest.raises(ValueError, match="labels must not hold the mask token"):
        model.loglikelihood(requests("loglikelihood", [("1", "[MASK]")]), True)
    with pytest.raises(ValueError, match="bound must be one of"):
        harness(bound="both").loglikelihood(requests("loglikelihood", [("1", "2")]), True)


def test_one_step_of_a_model_that_learned_d1_pays_a_digit_and_an_mdm_three():
    # Four tokens from nothing: -log p = log 10 of the distribution; independent tokens pay 4 log 10.
    texts = [("", f"{k}{(k + 1) % 10}{(k + 2) % 10}{(k + 3) % 10}") for k in range(10)]
    means = []
    for name in ("vmd-d1", "mdm-d1"):
        model = VMDLM(str(CARDS / name), num_steps=1, num_orders=16, batch_size=10, check_greedy=False)
        answers = model.loglikelihood(requests("loglikelihood", texts), True)
        means.append(-sum(score for score, _ in answers) / len(answers) / math.log(10))
    assert 1 < means[0] < 1.6 and means[1] == pytest.approx(4, abs=0.05)
