"""The scripts, from end to end, on the smallest tasks."""

import ast
import json
import shutil
from pathlib import Path

import benchmark
import compare_cdr3
import compare_text
import datasets
import evaluate_vmd
import generate_vmd
import numpy as np
import pytest
import quick_start
import solve_sudoku
import sudoku_figures
import torch
import train_vmd
import yaml
from helpers import tiny_model
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from vmd_hf import VMDForMaskedDiffusion, corpus_bound
from vmd_hf.data.characters import character_tokenizer
from vmd_hf.data.sudoku import format_boards, generate_puzzles, solve_puzzles
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.data.text import evenly_spaced, load_documents, text_datasets
from vmd_hf.evaluation import comparison
from vmd_hf.evaluation.speed import matmul_peak
from vmd_hf.evaluation.sudoku import fill_boards, puzzles_to_solve, puzzles_with_many_solutions
from vmd_hf.evaluation.text import batches_of, evaluate_samples
from vmd_hf.recipes import parse
from vmd_hf.tokenization import task_tokenizer, text_tokenizer
from vmd_hf.training import last_whole_checkpoint
from vmd_hf.training_run import build_adapted_model, build_data, build_model, groups_of_positions, read_documents

SCRIPTS = Path(train_vmd.__file__).parent
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))

SMALL = [
    "--hidden_size=16",
    "--num_attention_heads=2",
    "--num_hidden_layers=1",
    "--report_to=none",
    "--disable_tqdm=true",
]
WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps under a tree "


def test_no_script_imports_another():
    """`live_view`, which two share, is none: it has no `main`."""
    paths = [path for path in SCRIPTS.glob("*.py") if "def main(" in path.read_text()]
    names = {path.stem for path in paths}
    assert {"train_vmd", "evaluate_vmd", "benchmark"} <= names
    for path in paths:
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = {alias.name for node in nodes for alias in node.names} | {getattr(n, "module", "") for n in nodes}
        assert not modules & names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_its_arguments_win_over_defaults_and_lose_to_the_command_line(path):
    written = yaml.safe_load(path.read_text())
    model, data, training = parse([str(path), "--seed=7", "--report_to=none", "--norm_eps=0.5"])
    for arguments in (model, data, training):
        wrong = [name for name, value in written.items() if getattr(arguments, name, value) != value]
        assert set(wrong) <= {"seed", "learning_rate_scheduler", "report_to"}
    assert training.seed == 7 != written["seed"]
    if "model_name_or_path" in written:
        return
    sizes = {"synthetic": 4, "sudoku": 81, "text": data.sequence_length, "receptors": 28, "antibodies": 125}
    for latent_size in (model.latent_size, 0):  # without one it is the baseline
        model.latent_size = latent_size
        groups = groups_of_positions(model, data, sizes[data.task])
        tokenizer = character_tokenizer() if data.task == "text" else task_tokenizer(data.task)
        config = build_model(model, tokenizer, sizes[data.task], 1000, groups).config
        assert (config.latent_size, config.norm_eps) == (latent_size, 0.5)
        assert (config.position_groups is None) != bool(groups)


def test_what_a_recipe_sets_can_be_cleared(tmp_path):
    recipe = str(SCRIPTS / "recipes" / "sotu_lora.yaml")
    arguments = ["--where", "--lora_r", "none", "--model_name_or_path=None", "--report_to", "none"]
    model, data, training = parse([recipe, *arguments, "--objective_steps", "1", "3"])
    assert (data.where, model.lora_r, model.model_name_or_path, training.report_to) == ([], None, None, [])
    assert model.objective_steps == [1, 3] and parse([recipe, "--where=a=b"])[1].where == ["a=b"]
    for arguments in (["--objective_steps"], ["--hidden_size=none"], ["--lora_r=x"]):  # these cannot be empty
        with pytest.raises(SystemExit):
            parse(arguments)
    (tmp_path / "wrong.yaml").write_text("task: synthetic\nhiden_size: 3\n")
    with pytest.raises(ValueError, match="hiden_size"):
        parse([str(tmp_path / "wrong.yaml")])


@pytest.mark.parametrize(("recipe", "steps"), [("d1.yaml", (1, 2, 4)), ("d2_blocks.yaml", (1, 2))])
def test_the_quick_start_compares_saves_draws_and_loads(tmp_path, capsys, recipe, steps):
    arguments = ["--max_steps=3", "--num_train_rows=300", "--per_device_train_batch_size=20", *SMALL]
    quick_start.main([str(SCRIPTS / "recipes" / recipe), "--num_samples=200", f"--output_dir={tmp_path}", *arguments])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(result["variant"], result["num_steps"]) for result in results} == {
        (variant, step) for variant in ("mdm", "vmd") for step in steps
    }
    assert all(0 <= result["accuracy"] <= 1 and result["kl"] > 0 for result in results)
    assert {result["sampler"] for result in results if result["variant"] == "mdm"} == {"no latent, sampled"}
    assert (tmp_path / "heat_maps.png").stat().st_size > 10_000
    output = capsys.readouterr().out
    assert "loaded from" in output and "paper" in output
    for variant in ("mdm", "vmd"):
        config = AutoModelForMaskedLM.from_pretrained(tmp_path / f"{variant}-0").config
        assert (config.latent_size > 0) == (variant == "vmd")


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_text_model_is_trained_resumed_evaluated_and_generates(tmp_path, capsys, block_size):
    for index in range(12):
        (tmp_path / f"{index}.txt").write_text(WORDS * (5 + index))
    folder = tmp_path / "model"
    recipe = yaml.safe_load((SCRIPTS / "recipes" / "sotu.yaml").read_text())
    if block_size is None:
        del recipe["block_size"]
    else:
        recipe["prior"] = "learned"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [
        str(tmp_path / "recipe.yaml"),
        f"--source={tmp_path}",
        "--sequence_length=16",
        "--latent_size=2",
        "--latent_input=layers_and_positions",
        "--per_device_train_batch_size=8",
        "--per_device_eval_batch_size=4",
        "--num_eval_rows=8",
        "--eval_steps=2",
        "--save_steps=2",
        f"--output_dir={folder}",
        *SMALL,
    ]
    train_vmd.main([*arguments, "--max_steps=2"])
    train_vmd.main([*arguments, "--max_steps=4", "--resume_from_checkpoint=true"])
    assert json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    assert AutoModelForMaskedLM.from_pretrained(folder).config.block_size == block_size
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"

    evaluate_vmd.main(
        [
            f"--model={folder}",
            "--task=text",
            f"--source={tmp_path}",
            "--num_steps=2",
            "--num_texts=3",
            "--num_eval_rows=8",
            "--num_draws",
            "1",
            "3",
        ]
    )
    (objective,), (bound, tighter), (samples,) = json.loads((folder / "results.json").read_text()).values()
    assert objective["loss"] == pytest.approx(objective["reconstruction_loss"] + objective["kl"], rel=1e-5)
    assert 0 <= objective["active_units"] <= 2
    assert (bound["num_draws"], tighter["num_draws"], bound["num_tokens"]) == (1, 3, 8 * 16)
    for row in (bound, tighter):
        assert row["low"] < row["bits_per_token"] < row["high"] and row["bits_per_token"] > 2  # nothing is learned yet
    assert 0 < bound["kl_bits_per_token"] < bound["bits_per_token"] and tighter["kl_bits_per_token"] is None
    assert len(samples["sample"]) == 16 and 0 <= samples["known_words"] <= 1

    capsys.readouterr()
    generate_vmd.main([f"--model={folder}", "--prompt=the ", "--max_new_tokens=6", "--num_steps=3", "--watch"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("the ") and len(lines[-2]) == 10
    steps = 3 if block_size is None else 5  # 3 for the second block's four masks, 2 for the third's two
    passes = steps if block_size is None else steps + 2  # and one for each block's prior
    assert f"{passes} forward passes" in lines[-1]
    assert len(lines) == steps + 2


def write_speeches(folder, monkeypatch):
    """120 documents by two authors, in each split some of each; what `datasets` caches goes beside them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "data").mkdir()
    words = {"a": WORDS, "b": "we shall go on and on to the end of the road that leads to the sea "}
    rows = [{"text": words["ab"[index % 2]] * 4, "author": "ab"[index % 2]} for index in range(120)]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"--source={folder / 'data'}"


def test_an_adapter_is_trained_on_one_author_resumed_and_evaluated_beside_its_base(tmp_path, monkeypatch, capsys):
    source = write_speeches(tmp_path, monkeypatch)
    common = [source, "--sequence_length=16", "--save_steps=2", "--save_total_limit=2", "--eval_steps=2", *SMALL]
    base, judge, adapter = (str(tmp_path / name) for name in ("base", "judge", "adapter"))
    recipe = str(SCRIPTS / "recipes" / "sotu.yaml")
    train_vmd.main([recipe, *common, "--latent_size=2", "--prior=learned", "--max_steps=2", f"--output_dir={base}"])
    autoregressive = ["--block_size=1", "--objective=per_sample", "--objective_steps=1", "--where", "author=a"]
    train_vmd.main([recipe, *common, *autoregressive, "--max_steps=2", f"--output_dir={judge}"])
    before = load_file(f"{base}/model.safetensors")

    recipe, where = str(SCRIPTS / "recipes" / "sotu_lora.yaml"), ["--where", "author=b"]
    arguments = [recipe, *common, *where, f"--model_name_or_path={base}", "--lora_r=2", "--lora_latent=true"]
    arguments += ["--learning_rate=1e-2", "--warmup_steps=0"]
    capsys.readouterr()
    train_vmd.main([*arguments, "--max_steps=4", f"--output_dir={tmp_path / 'straight'}"])
    assert "trainable params:" in capsys.readouterr().out
    train_vmd.main([*arguments, "--max_steps=4", f"--output_dir={adapter}"])
    shutil.rmtree(f"{adapter}/checkpoint-4")
    for step in (2, 4):  # after the last nothing is left to do
        assert last_whole_checkpoint(adapter) == f"{adapter}/checkpoint-{step}"
        Path(adapter, "adapter_model.safetensors").unlink()
        train_vmd.main([*arguments, "--max_steps=4", f"--output_dir={adapter}", "--resume_from_checkpoint=true"])
        straight, resumed = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "adapter")
        )
        assert straight.keys() == resumed.keys() and any("modulation" in name for name in straight)
        for name, value in straight.items():
            torch.testing.assert_close(resumed[name], value, msg=name)
    after = load_file(f"{base}/model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    arguments = ["--task=text", source, *where, "--num_steps", "1", "2", "--num_texts=3"]
    evaluate_vmd.main([f"--model={adapter}", *arguments, f"--judge={judge}"])
    tables = json.loads(Path(adapter, "results.json").read_text())
    assert all("author=b" in title for title in tables)
    _, bounds, samples, quality = tables.values()
    lines = [(name, number) for name in ("baseline", "this one") for number in (1, 2)]
    assert [(row["model"], row["num_steps"]) for row in bounds] == lines
    evaluate_vmd.main([f"--model={base}", *arguments])
    of_base = list(json.loads(Path(base, "results.json").read_text()).values())[1]
    assert [row["bits_per_token"] for row in bounds[:2]] == [row["bits_per_token"] for row in of_base]
    assert all(row["low"] < row["bits_per_token"] < row["high"] for row in bounds)
    for before, after in zip(bounds[:2], bounds[2:], strict=True):
        assert after["high"] < before["low"]
        assert after["difference"] == pytest.approx(after["bits_per_token"] - before["bits_per_token"], rel=1e-6)
        assert after["difference_low"] < after["difference"] < after["difference_high"] < 0
    arguments += ["--num_draws", "1", "2", "--overwrite"]
    evaluate_vmd.main([f"--model={adapter}", *arguments, f"--baseline={judge}"])
    beside = list(json.loads(Path(adapter, "results.json").read_text()).values())[1]
    assert [row["num_draws"] for row in beside] == [1, 1, 1, 2, 1, 2]  # without a latent there is nothing to draw
    for row in beside[2:]:
        (of_judge,) = [other for other in beside[:2] if other["num_steps"] == row["num_steps"]]
        assert row["difference"] == pytest.approx(row["bits_per_token"] - of_judge["bits_per_token"], rel=1e-6)
    evaluate_vmd.main([f"--model={judge}", *arguments, f"--baseline={base}"])
    beside = list(json.loads(Path(judge, "results.json").read_text()).values())[1]
    for row, of_base in zip(beside[4:], (beside[1], beside[3]), strict=True):
        assert of_base["num_draws"] == 2
        assert row["difference"] == pytest.approx(row["bits_per_token"] - of_base["bits_per_token"], rel=1e-6)
    with pytest.raises(ValueError, match="baseline is for the task text, got sudoku"):
        evaluate_vmd.main([f"--model={judge}", "--task=sudoku", f"--baseline={base}"])
    with pytest.raises(ValueError, match="baseline must have the model's vocabulary"):
        evaluate_vmd.main([f"--model={judge}", *arguments, f"--baseline={SCRIPTS.parent / 'model_cards' / 'vmd-d1'}"])

    assert [row["num_steps"] for row in samples] == [1, 2]
    assert [row["num_steps"] for row in quality] == ["(test rows)", 1, 2]
    generate_vmd.main([f"--model={adapter}", "--prompt=we ", "--max_new_tokens=4"])
    assert capsys.readouterr().out.splitlines()[-2].startswith("we ")
    judge, tokenizer = AutoModelForMaskedLM.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)
    documents = load_documents(source.removeprefix("--source="), where=["author=b"])
    rows = text_datasets(documents, tokenizer, 16)["test"]
    assert {row["num_tokens"] for row in bounds} == {16 * len(rows)}  # all of this author's, and nobody else's
    # An autoregressive model's bound is its likelihood.
    found = corpus_bound(judge, [{"input_ids": evenly_spaced(rows, 3)[:]["input_ids"]}])
    assert quality[0]["judge_perplexity"] == pytest.approx(2**found.bits_per_token, rel=1e-4)


def test_the_adapter_of_the_recipe_has_less_than_a_twentieth_of_the_weights(tmp_path):
    """Of a model of blocks that has been given a latent. It is trained without a warm-up of the KL term, which the
    model may not have ended."""
    tokenizer = character_tokenizer()
    for recipe in ("sotu", "sotu_latent"):
        arguments = [str(SCRIPTS / "recipes" / f"{recipe}.yaml"), "--report_to=none"]
        args, data, _ = parse([*arguments, *([] if recipe == "sotu" else [f"--model_name_or_path={tmp_path}"])])
        base = build_model(args, tokenizer, data.sequence_length, num_training_forwards=1000)
        base.save_pretrained(tmp_path)
        assert base.generation_config.resample_latents == (recipe == "sotu_latent")
    assert base.config.kl_warmup_steps == 200 and base.config.block_size == 4
    arguments = [str(SCRIPTS / "recipes" / "sotu_lora.yaml"), f"--model_name_or_path={tmp_path}", "--report_to=none"]
    args, data, _ = parse(arguments)
    assert data.where == ["president=Roosevelt", "party=Democratic"]
    model = build_adapted_model(args)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < trained < 0.05 * base.num_parameters()
    ids = torch.arange(32)[None] % 26
    output = model.train()(input_ids=ids, labels=ids)
    assert output.kl > 0.01  # the posterior encodes much from the start
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.kl)


def save_text_model(folder, alphabet, **settings):
    """A model and its tokenizer, of characters that are not those of the text task."""
    tokenizer = character_tokenizer(alphabet)
    tokenizer.save_pretrained(folder)
    settings = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id} | settings
    tiny_model(pad_token_id=tokenizer.pad_token_id, max_position_embeddings=8, **settings).save_pretrained(folder)
    return tokenizer


def test_a_given_model_is_trained_and_evaluated_on_the_tokens_of_its_own_tokenizer(tmp_path):
    alphabet = "zyxwvutsrqponmlkjihgfedcba TL.5"
    text = "The Lazy dog. It sleeps 55 times. " * 3
    text = "".join(character for character in text if character in alphabet)
    (tmp_path / "texts").mkdir()
    for index in range(20):
        (tmp_path / "texts" / f"{index}.txt").write_text(text)
    tokenizer = save_text_model(tmp_path / "model", alphabet)
    arguments = ["--task=text", f"--source={tmp_path / 'texts'}", "--sequence_length=8", "--num_eval_rows=4"]
    train = [f"--model_name_or_path={tmp_path / 'model'}", f"--output_dir={tmp_path / 'trained'}", "--max_steps=1"]
    train_vmd.main([*arguments, *train, "--save_strategy=no", *SMALL])
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").get_vocab() == tokenizer.get_vocab()
    data_args = parse(arguments)[1]
    rows, _ = build_data(data_args, tokenizer, read_documents(data_args))
    assert "".join(tokenizer.batch_decode(rows[:13]["input_ids"]))[: len(text)] == text  # nothing is reduced
    evaluate_vmd.main(
        [f"--model={tmp_path / 'trained'}", *arguments[:2], "--num_eval_rows=4", "--num_texts=2", "--num_steps=1"]
    )
    _, _, (samples,) = json.loads((tmp_path / "trained" / "results.json").read_text()).values()
    assert set(samples["sample"]) <= set(alphabet)


@pytest.mark.parametrize(
    "settings",
    [["--documents=packed"], ["--documents=separate", "--block_size=2"], ["--streaming", "--documents=packed"]],
    ids=lambda settings: settings[0],
)
def test_a_model_and_its_tokenizer_are_trained_on_text_as_it_is(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    for index in range(1001 if "--streaming" in settings else 20):  # of a stream, 1,000 are held out
        (tmp_path / "texts" / f"{index:04}.txt").write_text(f"Größe {index}: 3 < 5!\n" * 4)
    folder = tmp_path / "model"
    arguments = ["--task=text", f"--source={tmp_path / 'texts'}", *settings]
    train = [
        "--sequence_length=16",
        "--num_eval_rows=4",
        "--latent_size=0",
        f"--output_dir={folder}",
        "--save_steps=1",
    ]
    train_vmd.main([*arguments, *train, "--tokenizer_size=265", "--max_steps=1", *SMALL])
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "Größe 5: 3 < 5!"
    assert len(tokenizer) == 265 and tokenizer.decode(tokenizer(text)["input_ids"]) == text
    before = tokenizer.get_vocab()
    resumed = ["--max_steps=2", "--resume_from_checkpoint=true", "--tokenizer_size=264"]  # it has one already
    train_vmd.main([*arguments, *train, *resumed, *SMALL])
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == before

    if "--streaming" not in settings:
        evaluation = [f"--model={folder}", "--num_texts=2", "--num_steps=1"]
        evaluate_vmd.main([*arguments[:3], *evaluation])
        (_,), (bound,), _ = json.loads((folder / "results.json").read_text()).values()
        rows = text_datasets(load_documents(tmp_path / "texts"), tokenizer, 16, settings[0].partition("=")[2])["test"]
        texts = tokenizer.batch_decode([row["input_ids"] for row in rows], skip_special_tokens=True)
        assert bound["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
        bits = bound["bits_per_token"] * bound["num_tokens"]
        assert bound["bits_per_byte"] == pytest.approx(bits / len("".join(texts).encode()), rel=1e-6)


def test_which_tokenizer_a_text_model_has(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    tokenizer = save_text_model(model, "abc ")
    bare = character_tokenizer("abc ")
    bare.mask_token = bare.pad_token = None
    bare.save_pretrained(other)
    assert text_tokenizer(model).get_vocab() == tokenizer.get_vocab()
    assert text_tokenizer(model, model).get_vocab() == tokenizer.get_vocab()
    assert text_tokenizer(None, "characters").get_vocab() == character_tokenizer().get_vocab()
    assert len(text_tokenizer(None, None, 265, ["abc"])) <= 265
    grown = text_tokenizer(None, other)
    assert (grown.mask_token, grown.pad_token) == ("[MASK]", "[PAD]")
    for arguments, message in (
        ((), "tokenizer must be given for a new text model: --tokenizer_size N"),
        ((None, "characters", 300), "tokenizer must be None with tokenizer_size = 300, got 'characters'"),
        ((model, None, 300), "tokenizer_size must be None with a given model"),
        ((model, "characters"), "tokenizer must be that of the given model, .*model, got 'characters'"),
    ):
        with pytest.raises(ValueError, match=message):
            text_tokenizer(*arguments)


def test_a_tokenizer_that_is_not_that_of_the_model_is_an_error(tmp_path):
    tokenizer = save_text_model(tmp_path, "abc ")
    train = [f"--model_name_or_path={tmp_path}", "--max_steps=1", f"--output_dir={tmp_path / 'out'}", *SMALL]
    with pytest.raises(
        ValueError, match=r"model of the task sudoku must have its vocabulary, .*got .*" + tmp_path.name
    ):
        train_vmd.main(["--task=sudoku", *train])
    with pytest.raises(
        ValueError, match=r"tokenizer must be the model's, which has 7 tokens .* 4, got one that has 12 and 10"
    ):
        evaluate_vmd.main([f"--model={tmp_path}"])
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text("abc cab bac")
    tiny_model(vocab_size=7, mask_token_id=5, pad_token_id=4, max_position_embeddings=8).save_pretrained(tmp_path)
    assert tokenizer.mask_token_id == 4
    text = ["--task=text", f"--source={tmp_path}"]
    for script, arguments in ((train_vmd, [*train, "--sequence_length=8"]), (evaluate_vmd, [f"--model={tmp_path}"])):
        with pytest.raises(ValueError, match="which has 7 tokens and the mask token 5, got one that has 7 and 4"):
            script.main([*text, *arguments])
    with pytest.raises(ValueError, match=r"model_name_or_path must name the model .*got None"):
        train_vmd.main(["--lora_r=4", *train[1:]])


def test_results_are_joined_and_not_overwritten_without_a_word(tmp_path):
    synthetic_tokenizer().save_pretrained(tmp_path)
    tiny_model(max_position_embeddings=4).save_pretrained(tmp_path)
    arguments = [f"--model={tmp_path}", "--num_samples=20", "--resample_latents=false"]
    evaluate_vmd.main([*arguments, "--num_steps=1"])
    evaluate_vmd.main([*arguments, "--num_steps=1", "--setting=d2"])
    path = tmp_path / "results.json"
    before = json.loads(path.read_text())
    assert list(before) == ["d1, 20 samples", "d2, 20 samples"]
    with pytest.raises(ValueError, match=r"output must not hold .*results.json with 'd1, 20 samples': .*--overwrite"):
        evaluate_vmd.main([*arguments, "--num_steps=2"])
    assert json.loads(path.read_text()) == before
    evaluate_vmd.main([*arguments, "--num_steps=2", "--overwrite"])
    after = json.loads(path.read_text())
    assert list(after) == list(before) and after["d2, 20 samples"] == before["d2, 20 samples"]
    assert [row["num_steps"] for row in after["d1, 20 samples"]] == [2, 2]
    path.write_text("[]")
    with pytest.raises(ValueError, match="output must be a file of tables"):
        evaluate_vmd.main(arguments)


def test_what_a_model_reads_is_on_its_device(tmp_path, monkeypatch):
    """`meta` computes nothing, so `generate` is replaced by one that looks at where the masks are."""
    seen = []

    def generate(self, input_ids, **settings):
        seen.append((self.device.type, input_ids.device.type))
        return torch.zeros(input_ids.shape, dtype=torch.long)

    monkeypatch.setattr(VMDForMaskedDiffusion, "generate", generate)
    vmd_d1 = SCRIPTS.parent / "model_cards" / "vmd-d1"
    output = [f"--output={tmp_path / 'results.json'}", "--device=meta", "--num_steps=1"]
    evaluate_vmd.main([f"--model={vmd_d1}", "--num_samples=10", *output])
    quick_start.show_reloaded(str(vmd_d1), torch.device("meta"))
    tokenizer = character_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), mask_token_id=27, pad_token_id=28).to("meta")
    evaluate_samples(model, tokenizer, 16, [], [1], 2)
    boards = fill_boards(model, torch.zeros(2, 81, dtype=torch.long), num_steps=1, remasking="random")
    assert boards.device.type == "cpu"
    rows = datasets.Dataset.from_dict({"input_ids": [[0, 1]]}).with_format("torch")
    assert batches_of(rows, 1, model)[0]["input_ids"].device.type == "meta"
    assert len(seen) == 5 and set(seen) == {("meta", "meta")}


def test_the_benchmark_compares_models_on_a_device(monkeypatch, capsys):
    small = benchmark.build
    monkeypatch.setattr(benchmark, "build", lambda *args, **kwargs: small(*args, **kwargs, layers=1, hidden_size=64))
    cpu = torch.device("cpu")
    assert 1e6 < matmul_peak(cpu, size=64, repeats=2) < 1e15
    monkeypatch.setattr(benchmark, "matmul_peak", lambda device: 1e12)
    table = benchmark.Comparison(repeats=1, device=cpu)
    benchmark.whole_sequences(table)
    assert [row["wanted"] for row in table.rows] == ["<= 1.25", "<= 1.05"]
    assert all(row["ratio"] == row["second"] / row["first"] > 0 for row in table.rows)
    assert "% of the measured peak" in capsys.readouterr().out


def test_models_of_text_are_compared_and_rows_that_are_there_are_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "matmul_peak", lambda *args, **kwargs: 1e12)  # takes long to measure
    for index in range(12):
        (tmp_path / f"{index}.txt").write_text(WORDS * (10 + index))
    rows = ["autoregressive", "mdm", "block-4", "vmd-8", "causal-4"]
    arguments = [
        f"--source={tmp_path}",
        "--sequence_length=16",
        "--max_steps=2",
        "--save_strategy=no",
        "--num_eval_rows=4",
        f"--output_dir={tmp_path / 'out'}",
        *SMALL,
    ]
    compare_text.main([*arguments, "--rows", *rows])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    steps = [sorted({bound["num_steps"] for bound in result["bounds"]}) for result in results]
    assert steps == [[1], [1, 2, 4, 8, 16], [1, 2, 4], [1, 2, 4, 8], [1, 2, 4]]
    lines = compare_text.lines_of(results)
    passes = {line["row"]: line["NFE a character"] for line in lines}
    assert passes == {"autoregressive": 1, "mdm": 1, "block-4": 1, "vmd-8": 1, "causal-4": 1}
    passes = {line["steps a block"]: line["NFE a character"] for line in lines if line["row"] == "vmd-8"}
    assert passes == {1: 2 / 8, 2: 3 / 8, 4: 4 / 8, 8: 1}  # one more for the prior, where steps have a latent
    draws = [(line["steps a block"], line["importance samples"]) for line in lines if line["row"] == "vmd-8"]
    assert draws == [(1, 1), (1, 16), (2, 1), (2, 16), (4, 1), (8, 1)]  # once, where steps have none
    assert set(results[2]["samples"]) == {"1", "2", "4"} and all(results[2]["samples"].values())
    assert imread(tmp_path / "out" / "frontier.png").shape[1] == 1540
    assert all(line["ms a character"] > 0 for line in lines)
    orders = {(line["order"], line["steps a block"]) for line in lines if line["row"] == "block-4"}
    assert orders == {("random", 1), ("random", 2), ("random", 4), ("left_to_right", 2), ("left_to_right", 4)}
    (one, other), differences = results[2:5:2], compare_text.differences_of(results)
    assert [(line["row"], line["steps a block"]) for line in differences] == [("causal-4", n) for n in (1, 2, 4)]
    for line in differences:
        best = [min(b["bits_per_token"] for b in r["bounds"] if b["num_steps"] == line["steps a block"])
                for r in (other, one)]  # fmt: skip
        assert line["difference"] == pytest.approx(best[0] - best[1], abs=1e-4)
        assert line["low"] < line["difference"] < line["high"]

    assert [len(result["training"]) for result in results] == [1, 2, 2, 2, 2]
    assert results[4]["training"][0] == results[2]["training"][0]
    training = results[3]["training"][1]
    assert training["updates"] == 2
    assert training["tokens_per_second"] == pytest.approx(2 * 16 * 16 / training["seconds"])
    assert 0 < training["share_of_matmul_peak"] < 1

    compare_text.main([*arguments, "--rows", "autoregressive", "block-8"])
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [*again[:3], *again[4:]] == results and again[3]["row"] == "block-8"
    assert again[3]["training"][0] == results[3]["training"][0]  # the stage that both begin with, trained once
    assert not (tmp_path / "out" / "vmd-8-0" / "stage-0").exists()

    before = sorted((tmp_path / "out").rglob("*"))
    for name, change in {"num_eval_rows": "--num_eval_rows=3", "arguments": "--learning_rate=1"}.items():
        with pytest.raises(ValueError, match=f"output_dir must hold rows of the same {name}, got .*settings.json"):
            compare_text.main([*arguments, "--rows", "mdm", change])
    monkeypatch.setitem(compare_text.ROWS, "mdm", compare_text.ROWS["vmd"])
    with pytest.raises(ValueError, match=r"output_dir must hold rows of the same stages, got .* of mdm"):
        compare_text.main([*arguments, "--rows", "mdm"])
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_models_of_receptors_are_compared_with_the_truth(tmp_path, monkeypatch):
    pytest.importorskip("olga", reason="needs olga: pip install vmd_hf[olga]")
    monkeypatch.setattr(comparison, "matmul_peak", lambda *args, **kwargs: 1e12)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = [
        "--num_sequences=5",
        "--max_steps=2",
        "--num_train_rows=50",
        "--num_eval_rows=5",
        "--per_device_train_batch_size=4",
        f"--output_dir={tmp_path / 'out'}",
        *SMALL,
    ]
    compare_cdr3.main([*arguments, "--rows", "mdm", "gaussian", "chain", "causal"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["row"] for result in results] == ["mdm", "gaussian", "chain", "causal"]
    orders = [(bound["num_steps"], bound["order"]) for bound in results[0]["bounds"]]
    several = [(steps, order) for steps in (2, 4, 8, 28) for order in ("random", "left_to_right")]
    assert orders == [(1, None), *several] == [(b["num_steps"], b["order"]) for b in results[2]["bounds"]]
    assert [sample["num_steps"] for sample in results[1]["samples"]] == [1, 2, 4, 8, 28]
    for bound in (bound for result in results for bound in result["bounds"]):  # two updates teach nothing
        assert 20 < bound["truth"] < 60 < bound["bits"] and bound["low"] < bound["above"] < bound["high"]
    lines = compare_cdr3.bound_lines(results)
    assert [(line["row"], line["order"], line["draws"]) for line in lines] == [
        ("mdm", "random", 1),
        ("mdm", "left_to_right", 1),
        ("gaussian", "random", 16),
        ("gaussian", "random", 1),
        ("chain", "random", 1),
        ("chain", "left_to_right", 1),
        ("causal", "random", 1),
        ("causal", "left_to_right", 1),
    ]
    monkeypatch.setattr(comparison, "train", lambda *args: pytest.fail("it trained again"))
    compare_cdr3.main([*arguments, "--rows", "mdm", "chain"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_model_of_whole_boards_completes_clues_that_leave_many_solutions(tmp_path):
    recipe = str(SCRIPTS / "recipes" / "boards.yaml")
    arguments = ["--num_train_rows=8", "--num_eval_rows=4", "--save_steps=2", "--eval_steps=2", "--max_steps=2"]
    train_vmd.main([recipe, *arguments, f"--output_dir={tmp_path}", *SMALL])
    config = AutoModelForMaskedLM.from_pretrained(tmp_path).config
    assert config.latent_input == "position_slices" and config.latent_size == 4 * 81
    arguments = ["--num_puzzles=20", "--num_clues", "0", "24", "--num_steps", "1", "3", "--remasking", "random"]
    evaluate_vmd.main([f"--model={tmp_path}", "--task=boards", *arguments])
    (results,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert [(row["clues"], row["num_steps"], row["sampler"]) for row in results] == [
        (clues, steps, f"{sampler} latent, sampled")
        for clues in (0, 24)
        for steps in (1, 3)
        for sampler in ("shared", "per-step")
    ]
    for row in results:  # two updates teach nothing, and clues are what is right
        assert row["puzzles"] == row["distinct"] == 20 and row["solved"] == 0 and 0 <= row["valid_units"] < 0.5
    evaluate_vmd.main([f"--model={tmp_path}", "--task=boards", *arguments, "--resample_latents=true", "--overwrite"])
    (fresh,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert fresh == results[1::2]


@pytest.mark.parametrize("num_clues", [0, 16, 24])
def test_clues_that_leave_many_solutions(num_clues):
    puzzles = puzzles_with_many_solutions(20, num_clues, seed=0)
    assert puzzles.shape == (20, 81) and ((puzzles > 0).sum(1) == num_clues).all()
    assert (solve_puzzles(puzzles, limit=100)[0] == 100).all()
    assert len(np.unique(puzzles, axis=0)) == (20 if num_clues else 1)


def test_puzzles_of_a_file_are_taken_evenly(tmp_path):
    puzzles, solutions = generate_puzzles(10, 40, seed=0)
    lines = [",".join(pair) for pair in zip(format_boards(puzzles), format_boards(solutions), strict=True)]
    (tmp_path / "puzzles.csv").write_text("\n".join(["puzzle,solution", *lines]) + "\n")
    for count, rows in ((5, [0, 2, 4, 6, 8]), (4, [0, 2, 5, 7]), (99, list(range(10)))):
        table = puzzles_to_solve(tmp_path / "puzzles.csv", count)
        assert np.array_equal(table.puzzles, puzzles[rows]) and np.array_equal(table.solutions, solutions[rows])


def test_a_sudoku_model_is_trained_evaluated_drawn_and_draws_its_board(tmp_path, capsys):
    common = ["--num_train_rows=20", "--num_eval_rows=4", "--eval_steps=2", "--save_steps=2", "--max_steps=2", *SMALL]
    basics, solver = tmp_path / "basics", tmp_path / "solver"
    train_vmd.main([str(SCRIPTS / "recipes" / "sudoku_basics.yaml"), *common, f"--output_dir={basics}"])
    recipe = str(SCRIPTS / "recipes" / "sudoku.yaml")
    arguments = [
        f"--model_name_or_path={basics}",
        "--min_clues=30",
        "--max_clues=36",
        "--num_loops=2",
        f"--output_dir={solver}",
    ]
    train_vmd.main([recipe, *arguments, *common])
    config = AutoModelForMaskedLM.from_pretrained(solver).config
    assert config.hidden_size == 16 and (config.num_loops, config.objective) == (2, "per_sample")
    assert len(config.position_groups) == 3 and config.position_group_bias

    for folder in (solver / "checkpoint-2", solver):
        evaluate_vmd.main([f"--model={folder}", "--task=sudoku", "--num_puzzles=6", "--num_steps", "1", "2"])
    results, parts = json.loads((solver / "results.json").read_text()).values()
    assert [(row["remasking"], row["num_steps"]) for row in results] == [
        (rule, steps) for rule in ("top_prob", "top_prob_margin") for steps in (1, 2)
    ]
    assert sum(row["puzzles"] for row in parts if row["group"].startswith("clues")) == 6

    attempts = ["--num_puzzles=4", "--num_steps=2", "--remasking=top_prob", "--num_attempts=5", "--bf16"]
    evaluate_vmd.main([f"--model={solver}", "--task=sudoku", *attempts, f"--output={tmp_path / 'attempts.json'}"])
    results, _ = json.loads((tmp_path / "attempts.json").read_text()).values()
    expected = [(1, 2.0), (2, 4.0), (4, 8.0)]  # nothing is solved, so each attempt takes its two passes
    assert [(row["num_attempts"], row["nfe"]) for row in results] == expected

    puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    sudoku_figures.main([f"--model={solver}", "--num_steps=2", f"--puzzle={puzzle}"])
    for name in ("accuracy_over_steps.png", "accuracy_over_training.png", "board.png"):
        assert len(np.unique(imread(solver / name))) > 10
    one = imread(solver / "accuracy_over_steps.png")
    sudoku_figures.main(["--model", str(solver), str(solver / "checkpoint-2"), "--num_steps=2"])
    assert (imread(solver / "accuracy_over_steps.png") != one).any()
    capsys.readouterr()
    assert solve_sudoku.main([f"--model={solver}", "--num_steps=3", puzzle]) == 1  # two updates teach nothing
    lines = capsys.readouterr().out.splitlines()
    cells = "".join(line.replace("|", "").replace(" ", "") for line in lines if line[:1].isdigit())
    assert len(cells) == 81
    assert all(clue in (".", cell) for clue, cell in zip(puzzle, cells, strict=True))
    assert lines[-1].startswith("not valid")
