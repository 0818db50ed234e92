"""Uploads and downloads with the genuine client, to and from a small server on this machine."""

import json

import pytest
import torch
import transformers.utils.hub
from datasets import Dataset
from hub_server import running_hub
from huggingface_hub import constants, hf_api
from huggingface_hub.errors import HfHubHTTPError
from push_to_hub import main
from test_hub import CODE, WEIGHTS, assert_same_state, canvas, run_elsewhere, small_model
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

from vmd_hf.data.synthetic import synthetic_tokenizer
from vmd_hf.hub import check_model, export_model, load_model, saved_with_code, upload_folder

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# A model\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield server


@pytest.fixture
def upload(tmp_path):
    def upload_model(model, repo_id, card=CARD):
        folder = tmp_path / "exported"
        export_model(model, folder, synthetic_tokenizer())
        (folder / "README.md").write_text(card)
        upload_folder(folder, repo_id)

    return upload_model


def environment(hub):
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def test_what_the_script_uploads_in_one_commit_works_without_the_package(hub, tmp_path):
    model, tokenizer = small_model(), synthetic_tokenizer()
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "README.md").write_text(CARD)
    (tmp_path / "trained" / "results.json").write_text("{}")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "README.md").write_text("# An older card\n")
    main([str(tmp_path / "trained"), str(tmp_path / "exported"), "--repo_id", "me/model"])
    assert len(hub.repositories["me/model"]) == 2  # empty, and with everything
    assert set(hub.head("me/model")) == WEIGHTS | CODE | TOKENIZER | {"README.md", "results.json"}
    assert hub.head("me/model")["README.md"].decode() == CARD

    ids, latents = canvas(model)
    torch.save({"ids": ids, "latents": latents}, tmp_path / "inputs.pt")
    process = run_elsewhere(
        """
        import sys
        sys.modules["vmd_hf"] = None  # as if it were not installed
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

        remote = {"trust_remote_code": True}
        assert AutoConfig.from_pretrained("me/model", **remote).latent_size == 3
        AutoModel.from_pretrained("me/model", **remote)
        model = AutoModelForMaskedLM.from_pretrained("me/model", **remote)
        tokenizer = AutoTokenizer.from_pretrained("me/model")
        inputs = torch.load("../inputs.pt")
        results = {"tokens": model.generate(inputs["ids"], latents=inputs["latents"])}
        pipe = pipeline("masked-diffusion", model="me/model", **remote)
        results["text"] = pipe("12[MASK][MASK]", seed=0)["generated_text"]
        torch.save(results, "../results.pt")
        """,
        tmp_path,
        **environment(hub),
    )
    assert process.returncode == 0, process.stderr
    results = torch.load(tmp_path / "results.pt")
    assert torch.equal(results["tokens"], model.generate(ids, latents=latents))
    assert results["text"].startswith("12") and len(results["text"]) == 4


def test_a_model_pushes_itself_with_its_code(hub):
    model = small_model()
    model.push_to_hub("me/own", tokenizer=synthetic_tokenizer())
    assert len(hub.repositories["me/own"]) == 2
    assert set(hub.head("me/own")) >= WEIGHTS | CODE | TOKENIZER | {"README.md"}
    assert set(json.loads(hub.head("me/own")["config.json"])["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForMaskedLM",
    }
    loaded = AutoModelForMaskedLM.from_pretrained("me/own")  # the package's own code comes first
    assert_same_state(loaded, model)


def test_a_trainer_pushes_the_code_with_its_checkpoints_and_at_the_end(hub, tmp_path):
    model = small_model()
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        push_to_hub=True,
        hub_model_id="me/run",
        hub_always_push=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=synthetic_tokenizer())
    with saved_with_code(model):
        trainer.train()
        trainer.push_to_hub()
    assert len(hub.repositories["me/run"]) >= 3
    files = hub.head("me/run")
    assert set(files) >= WEIGHTS | CODE | TOKENIZER | {"README.md"}
    assert "AutoModelForMaskedLM" in json.loads(files["config.json"])["auto_map"]
    assert_same_state(AutoModelForMaskedLM.from_pretrained("me/run"), model)


@pytest.mark.parametrize("broken", ["/upload/", "/preupload/", "/commit/", "/objects/batch"])
def test_an_upload_that_fails_leaves_the_repository_as_it_was(hub, upload, broken):
    model = small_model()
    upload(model, "me/model")
    before = dict(hub.head("me/model"))
    with torch.no_grad():
        model.model.embeddings.embed_tokens.weight.add_(1)
    hub.fail_on = broken
    with pytest.raises((HfHubHTTPError, RuntimeError), match=r"403|refused|Error while uploading"):
        upload(model, "me/model")
    assert hub.head("me/model") == before and len(hub.repositories["me/model"]) == 2
    hub.fail_on = None
    upload(model, "me/model")
    assert hub.head("me/model")["model.safetensors"] != before["model.safetensors"]


def test_a_card_that_is_not_valid_is_found_before_anything_is_made(hub, upload):
    with pytest.raises(ValueError, match="license"):
        upload(small_model(), "me/model", "---\nlicense: unheard-of\n---\n\n# A model\n")
    assert not hub.repositories


def test_a_model_of_the_hub_is_found_and_one_that_is_not_there_is_not(hub, upload):
    upload(small_model(), "me/model")
    asked = len(hub.requests)
    check_model("me/model")
    with pytest.raises(ValueError, match="got 'me/other': no such folder, and no such model on the Hub"):
        check_model("me/other")
    assert len(hub.requests) == asked + 2
    load_model("me/model", "cpu")
    asked = len(hub.requests)
    check_model("me/model")  # in the cache
    assert len(hub.requests) == asked


def test_loading_runs_no_code_of_a_repository_unless_it_is_trusted(hub, upload, tmp_path):
    upload(small_model(), "me/model")
    marker = tmp_path / "marker"
    for name in CODE:
        hub.head("me/model")[name] = f"open({str(marker)!r}, 'w')\n".encode()
    assert type(AutoModelForMaskedLM.from_pretrained("me/model")).__module__ == "vmd_hf.modeling_vmd"
    process = run_elsewhere(
        """
        import sys
        sys.modules["vmd_hf"] = None
        from transformers import AutoConfig, AutoModelForMaskedLM

        for auto in (AutoConfig, AutoModelForMaskedLM):
            try:
                auto.from_pretrained("me/model")
            except ValueError as error:
                assert "trust_remote_code" in str(error)
            else:
                raise AssertionError
        """,
        tmp_path,
        **environment(hub),
    )
    assert process.returncode == 0, process.stderr
    assert not marker.exists()
