"""Files of prompts: what a row gives depends on nothing but the row, and a kill loses and doubles nothing."""

import json
from pathlib import Path

import generate_vmd
import pytest
import torch
from helpers import tiny_model
from test_distributed import launch

from vmd_hf import bulk
from vmd_hf.bulk import generate_file, row_seed
from vmd_hf.data.synthetic import synthetic_tokenizer

PROMPTS = ["12", "", "3[MASK][MASK]6", "4567", "89012", "1", "22"]
SETTINGS = {"max_new_tokens": 3, "num_steps": 2, "do_sample": True, "remasking": "random"}
TOKENIZER = synthetic_tokenizer()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "id": f"é{i}"}) + "\n" for i, prompt in enumerate(PROMPTS)))
    return path


@pytest.fixture
def model():
    return tiny_model(max_position_embeddings=16, block_size=4)


def lines_of(path):
    return list(map(json.loads, path.read_text().splitlines()))


def test_each_row_is_generated_as_alone(source, model, tmp_path):
    generate_file(model, TOKENIZER, source, tmp_path / "out.jsonl", batch_size=3, seed=5, **SETTINGS)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [(line["prompt"], line["id"]) for line in lines] == [(prompt, f"é{i}") for i, prompt in enumerate(PROMPTS)]
    for index, line in enumerate(lines):
        ids = torch.tensor([TOKENIZER(line["prompt"])["input_ids"]], dtype=torch.long)
        generator = [torch.Generator().manual_seed(row_seed(5, index))]
        (row,) = model.generate(ids, generator=generator, **SETTINGS)
        assert line["text"] == TOKENIZER.decode(row) and line["completion"] == TOKENIZER.decode(row[ids.shape[1] :])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]
    generate_file(model, TOKENIZER, source, tmp_path / "other.jsonl", seed=6, **SETTINGS)
    assert lines_of(tmp_path / "other.jsonl") != lines


def test_a_kill_loses_and_doubles_nothing(source, model, tmp_path, monkeypatch):
    generate_file(model, TOKENIZER, source, tmp_path / "whole.jsonl", batch_size=2, **SETTINGS)
    output, batches, generate_batch = tmp_path / "out.jsonl", [], bulk.generate_batch

    def dying(model, tokenizer, prompts, indices, *args):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(indices)
        return generate_batch(model, tokenizer, prompts, indices, *args)

    monkeypatch.setattr(bulk, "generate_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        generate_file(model, TOKENIZER, source, output, batch_size=2, **SETTINGS)
    part = tmp_path / "out.jsonl.parts" / "0.jsonl"
    assert not output.exists() and len(lines_of(part)) == 4
    last = part.read_text().splitlines()[-1]
    part.write_text(part.read_text()[: -len(last) // 2])  # killed while it wrote
    for changes, name in (({"seed": 1}, "seed"), ({"num_steps": 1}, "settings")):
        with pytest.raises(ValueError, match=f"output must be that of the same {name}, got .*parts"):
            generate_file(model, TOKENIZER, source, output, batch_size=2, **(SETTINGS | changes))
    batches.clear()
    monkeypatch.setattr(bulk, "generate_batch", lambda *args: batches.append(args[3]) or generate_batch(*args))
    generate_file(model, TOKENIZER, source, output, batch_size=2, **SETTINGS)
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text() and not part.parent.exists()
    assert sum(map(len, batches)) == len(PROMPTS) - 3
    with pytest.raises(ValueError, match=r"output must be a file that does not exist, got .*out.jsonl"):
        generate_file(model, TOKENIZER, source, output, **SETTINGS)


@pytest.mark.parametrize("line", ["12", '{"text": "12"}', '{"prompt": 12}', "{"])
def test_a_line_without_a_prompt_is_named(line, source, model, tmp_path):
    source.write_text(f'{{"prompt": "1"}}\n{line}\n')
    with pytest.raises(ValueError, match=r'must have lines like {"prompt": "..."}, got .* in line 2 of .*jsonl'):
        generate_file(model, TOKENIZER, source, tmp_path / "out.jsonl", **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_two_processes_write_what_one_does(source, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    arguments = [f"--model={tmp_path / 'model'}", f"--input={source}", "--batch_size=2", *settings]
    generate_vmd.main([*arguments, f"--output={tmp_path / 'one.jsonl'}"])
    script = Path(generate_vmd.__file__)
    launch("cpu_2.yaml", script, *arguments, f"--output={tmp_path / 'two.jsonl'}")
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    with pytest.raises(ValueError, match=r"input and output must be given together, got .*jsonl and None"):
        generate_vmd.main(arguments)
