import pytest
import torch
from test_hub import run_elsewhere, small_model
from transformers import pipeline

from vmd_hf import MaskedDiffusionPipeline
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.hub import export_model

TEXTS = ["12[MASK][MASK]5", "[MASK]4", "7[MASK][MASK][MASK]0[MASK]"]


def make(**changes):
    return pipeline("masked-diffusion", model=small_model(**changes), tokenizer=synthetic_tokenizer())


def assert_same(actual, expected):
    assert [one["generated_text"] for one in actual] == [other["generated_text"] for other in expected]
    for one, other in zip(actual, expected, strict=True):
        assert [token["index"] for token in one["tokens"]] == [token["index"] for token in other["tokens"]]
        for a, b in zip(one["tokens"], other["tokens"], strict=True):
            assert a["token"] == b["token"] and a["confidence"] == pytest.approx(b["confidence"], rel=1e-4)
        assert one.get("history") == other.get("history")


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("settings", [{"num_steps": 2}, {"max_new_tokens": 2, "num_steps": 1}, {"do_sample": True}])
def test_a_batch_gives_what_its_texts_give_alone(block_size, settings):
    pipe = make(block_size=block_size)
    assert type(pipe) is MaskedDiffusionPipeline
    settings = {**settings, "seed": 3, "return_history": True}
    alone = [pipe(text, **settings) for text in TEXTS]
    assert_same(pipe(TEXTS, batch_size=3, **settings), alone)
    assert_same(pipe(TEXTS, batch_size=2, **settings), alone)


def test_what_is_returned_is_what_generate_gives():
    pipe, tokenizer = make(), synthetic_tokenizer()
    result = pipe(TEXTS[0], seed=5, return_history=True, num_steps=2)
    output = pipe.model.generate(
        tokenizer(TEXTS[0], return_tensors="pt")["input_ids"],
        num_steps=2,
        generator=torch.Generator().manual_seed(5),
        return_dict_in_generate=True,
        output_confidences=True,
    )
    assert result["generated_text"] == tokenizer.decode(output.sequences[0])
    assert [token["index"] for token in result["tokens"]] == [2, 3]
    for token in result["tokens"]:
        assert token["token"] == output.sequences[0, token["index"]]
        assert token["token_str"] == result["generated_text"][token["index"]]
        assert token["confidence"] == pytest.approx(output.confidences[0, token["index"]].item())
    assert result["history"][0] == TEXTS[0] and result["history"][-1] == result["generated_text"]
    assert [state.count("[MASK]") for state in result["history"]] == [2, 1, 0]
    assert "history" not in pipe(TEXTS[0])


def test_prompts_are_continued_up_to_the_end_of_the_text():
    pipe = make(eos_token_id=[4, 6, 8])
    results = pipe(["1", "23", ""], max_new_tokens=5, do_sample=True, seed=0, batch_size=3)
    lengths = [len(result["generated_text"]) for result in results]
    for prompt, result, length in zip(["1", "23", ""], results, lengths, strict=True):
        new = result["generated_text"].removeprefix(prompt)
        assert len(new) + len(prompt) == length and not set("468") & set(new[:-1])
        assert len(new) == 5 or new[-1] in "468"
    assert min(lengths) < 5  # some text has ended early


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_stepz": 2}, "knows no argument 'num_stepz'"),
        ({"output_history": True}, "knows no argument 'output_history'"),
        ({"num_steps": 0}, "num_steps must be None or an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make()("1[MASK]", **settings)
    with pytest.raises(ValueError, match=r"texts must be strings, got 3"):
        make()([3])
    with pytest.raises(ValueError, match="characters of the vocabulary, '0123456789', got 'x'"):
        make()("1x[MASK]")


def test_an_exported_model_brings_its_pipeline(tmp_path):
    pipe = make()
    export_model(pipe.model, tmp_path / "model", pipe.tokenizer)
    process = run_elsewhere(
        """
        import sys
        sys.modules["vmd_hf"] = None  # as if it were not installed
        from transformers import pipeline

        pipe = pipeline("masked-diffusion", model="../model", trust_remote_code=True)
        print(type(pipe).__module__)
        print(pipe(["12[MASK][MASK]5", "[MASK]4"], seed=3, batch_size=2)[0]["generated_text"])
        pipe.save_pretrained("../again")
        pipe = pipeline("masked-diffusion", model="../again", trust_remote_code=True)
        print(pipe("12[MASK][MASK]5", seed=3)["generated_text"])
        """,
        tmp_path,
    )
    assert process.returncode == 0, process.stderr
    module, first, second = process.stdout.splitlines()[-3:]
    assert module.startswith("transformers_modules.")
    assert first == second == pipe(TEXTS[0], seed=3)["generated_text"]
