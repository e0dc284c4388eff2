"""How a recipe has its base loaded: revision, precision, attention."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import HubServer, connect
from huggingface_hub import HfApi
from test_train import write_base, write_recipe
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_ptune import PTuneConfig
from hf_ptune.backbone import load_backbone
from hf_ptune.data import load_rows
from hf_ptune.errors import BackboneError, RecipeError
from hf_ptune.fresh_base import load_tokenizer
from hf_ptune.prompt_start import base_tokenizer
from hf_ptune.publishing import tokenizer_of
from hf_ptune.recipe import make_recipe, read_recipe
from hf_ptune.train import run, wrap_base


def test_a_revision_of_the_base_is_the_one_that_is_trained_on_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        server.add_user("alice", "alice-writes")
        connect(monkeypatch, server)
        api = HfApi(endpoint=server.url, token="alice-writes")
        api.create_repo("alice/base")
        api.create_branch("alice/base", branch="other")
        for branch in ("main", "other"):
            folder = tmp_path / branch
            write_base(folder, "bert", "SEQ_CLS")
            if branch == "other":
                model = AutoModel.from_pretrained(folder)
                torch.nn.init.normal_(model.encoder.layer[0].attention.self.query.weight)
                model.save_pretrained(folder)
            api.upload_folder(repo_id="alice/base", folder_path=folder, revision=branch)
        commit = server.repos["alice/base"].at("other").id
        content = write_recipe(tmp_path, "SEQ_CLS", "alice/base", base_options={"revision": "other"})
        content["training"] |= {"max_steps": 1}
        folder = run(make_recipe(content, folder=tmp_path)).folder

        assert json.loads((folder / "config.json").read_text())["base_model_revision"] == commit
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
        main = AutoModelForSequenceClassification.from_pretrained(tmp_path / "main")
        query = [m.bert.encoder.layer[0].attention.self.query.weight for m in (loaded.backbone, base, main)]
        assert torch.equal(query[0], query[1]) and not torch.equal(query[1], query[2])

        content["base_options"] = {"revision": "third"}
        with pytest.raises(BackboneError, match="'alice/base' cannot be loaded.*third"):
            run(make_recipe(content, folder=tmp_path))


def test_precision_and_attention_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "llama", "CAUSAL_LM")
    options = {"dtype": "bfloat16", "attn_implementation": "eager"}
    content = write_recipe(tmp_path, "CAUSAL_LM", base, base_options=options)
    content["training"] |= {"max_steps": 2}
    seen = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = load_backbone(*args, **kwargs)
        seen.append(found[0])
        return found

    for room in ("fresh_base", "loading"):
        monkeypatch.setattr(f"hf_ptune.{room}.load_backbone", watched)
    outcome = run(make_recipe(content, folder=tmp_path))
    assert outcome.after["loss"] > 0
    assert len(seen) == 2, "the base, and that of the adapter that is asked"
    for backbone in seen:
        assert backbone.dtype == torch.bfloat16 and backbone.config._attn_implementation == "eager"


def test_wrong_options_of_the_base_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    content = write_recipe(tmp_path, "SEQ_CLS", "nowhere", base_options={"torch_dtype": "bfloat16"})
    with pytest.raises(RecipeError, match="unknown key base_options.torch_dtype; did you mean base_options.dtype"):
        make_recipe(content)
    with pytest.raises(RecipeError, match="base_options.revision is 3"):
        make_recipe(content | {"base_options": {"revision": 3}})
    with pytest.raises(RecipeError, match="base_options.dtype is 'bf16'.*'bfloat16'"):
        make_recipe(content | {"base_options": {"dtype": "bf16"}})
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(content | {"base_options": {}}))
    assert read_recipe(file, ["--base_options.dtype=float16"]).base_options == {"dtype": "float16"}


def test_a_revision_of_what_is_no_repository_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    content = write_recipe(tmp_path, "SEQ_CLS", base, base_options={"revision": "other"})
    with pytest.raises(BackboneError, match="is no repository of the Hub, so that it has no revision 'other'"):
        run(make_recipe(content, folder=tmp_path))


def test_tokenizers_are_those_of_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **options: seen.append(options["revision"]))
    config = PTuneConfig(base_model_name_or_path="alice/base", base_model_revision="other")
    base_tokenizer(config)
    tokenizer_of(config)
    tokenizer_of(PTuneConfig(base_model_name_or_path="alice/base"))
    assert seen == ["other", "other", "main"]


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_a_head_in_half_precision_is_told(
    dtype: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    recipe = make_recipe(write_recipe(tmp_path, "SEQ_CLS", base, base_options={"dtype": dtype}), folder=tmp_path)
    wrap_base(recipe, load_rows(recipe), load_tokenizer(base))
    assert ("small steps are lost" in caplog.text) is warned


@pytest.mark.slow
def test_a_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = write_base(tmp_path / "base", "llama", "CAUSAL_LM")
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    content = write_recipe(tmp_path, "CAUSAL_LM", base, base_options={"quantization_config": quantized})
    outcome = run(make_recipe(content, folder=tmp_path))
    assert outcome.after["loss"] < outcome.before["loss"] and len(outcome.answers) == 3
