"""A prompt that starts where another adapter's prompt ended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import METHODS, batch, build

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import BackboneError, ConfigError

Wrap = Callable[..., PTunePreTrainedModel]
PROMPTS = [m for m in METHODS if m != "bitfit"]


@pytest.fixture
def trained(wrap: Wrap, tmp_path: Path) -> Callable[..., tuple[PTunePreTrainedModel, str]]:
    """A model with a prompt and a head of its own, and the folder that holds it."""

    def make(method: str, flatten: bool = False, **options: Any) -> tuple[PTunePreTrainedModel, str]:
        model = wrap("bert", method, **options)
        with torch.no_grad():
            model.backbone.classifier.weight.normal_()
        folder = tmp_path / f"{method}-{flatten}"
        model.save_pretrained(folder, flatten=flatten)
        return model, str(folder)

    return make


def fresh(
    wrap: Wrap, method: str, folder: str, family: str = "bert", task: str | None = None, **options: Any
) -> PTunePreTrainedModel:
    named = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": folder} | options
    return wrap(family, method, task, strong=False, **named)


def hidden(model: PTunePreTrainedModel) -> torch.Tensor:
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [(m, m) for m in PROMPTS]
    + [("p_tuning", "prompt_tuning"), ("prefix_tuning", "p_tuning_v2")]
    + [("prompt_tuning", "p_tuning"), ("p_tuning_v2", "prefix_tuning")],
)
def test_the_prompt_says_what_it_said(source: str, target: str, flatten: bool, wrap: Wrap, trained: Any) -> None:
    dropout = {"encoder_dropout": 0.5, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2}
    model, folder = trained(source, flatten, **dropout)
    other = fresh(wrap, target, folder)
    assert torch.allclose(hidden(other), hidden(model), atol=1e-10)
    assert not torch.equal(other.backbone.classifier.weight, model.backbone.classifier.weight)


def test_an_encoder_comes_with_its_own_weights(wrap: Wrap, trained: Any) -> None:
    for options in ({"encoder_reparameterization_type": "LSTM"}, {"encoder_hidden_size": 9}):
        model, folder = trained("p_tuning", **options)
        other = fresh(wrap, "p_tuning", folder, **options)
        theirs = model.prompt.state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in other.prompt.state_dict().items())
        narrow = fresh(wrap, "p_tuning", folder, encoder_hidden_size=5)  # another network, the same prompt
        assert torch.allclose(hidden(narrow), hidden(model), atol=1e-10)


def test_another_task_of_the_same_base(wrap: Wrap, trained: Any) -> None:
    model, folder = trained("p_tuning_v2")
    other = fresh(
        wrap, "p_tuning_v2", folder, task="TOKEN_CLS", base_model_name_or_path=model.config.base_model_name_or_path
    )
    assert torch.equal(other.prompt.weight, model.prompt.weight) and other.config.task == "TOKEN_CLS"


def test_a_head_comes_along_where_it_is_asked_for(wrap: Wrap, trained: Any, tmp_path: Path) -> None:
    model, folder = trained("p_tuning_v2")
    other = fresh(wrap, "p_tuning_v2", folder, prompt_tuning_init_head=True)
    assert torch.equal(other.backbone.classifier.weight, model.backbone.classifier.weight)
    inputs = batch("bert")
    assert torch.allclose(other(**inputs).logits, model(**inputs).logits, atol=1e-10)
    backbone = build("bert", num_labels=5)
    named = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": folder, "num_virtual_tokens": 4}
    assert get_ptune_model(backbone, PTuneConfig(**named)).config.num_labels == 5
    with pytest.raises(ConfigError, match=r"head of .* labels .*Leave prompt_tuning_init_head out"):
        get_ptune_model(backbone, PTuneConfig(**named, prompt_tuning_init_head=True))


def test_labels_are_compared_by_their_numbers(wrap: Wrap, tmp_path: Path) -> None:
    """A file has the numbers as texts, in the order of those: "1", "10", "11", "2"."""
    names = {"num_labels": 12, "id2label": {n: f"kind {n}" for n in range(12)}}
    get_ptune_model(build("bert", **names), PTuneConfig(num_virtual_tokens=4)).save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    config = PTuneConfig(num_virtual_tokens=4, prompt_tuning_init_head=True, **start)
    assert get_ptune_model(build("bert", **names), config).config.label_names == [f"kind {n}" for n in range(12)]
    names["id2label"] = {n: f"kind {11 - n}" for n in range(12)}
    with pytest.raises(ConfigError, match="Leave prompt_tuning_init_head out"):
        get_ptune_model(build("bert", **names), config)


def test_saved_it_needs_the_source_no_more(wrap: Wrap, trained: Any, tmp_path: Path) -> None:
    _, folder = trained("p_tuning_v2")
    other = fresh(wrap, "p_tuning_v2", folder)
    other.save_pretrained(tmp_path / "other")
    for file in Path(folder).iterdir():
        file.unlink()
    again = type(other).__mro__[1].from_pretrained(tmp_path / "other")
    assert torch.equal(again.prompt.weight.double(), other.prompt.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_virtual_tokens": 3}, ConfigError, "has 4 virtual tokens, and this configuration 3; set num_virtual_to"),
        ({"method": "prompt_tuning"}, ConfigError, "trained keys and values of every layer, and prompt_tuning takes"),
        ({"layers": [0]}, ConfigError, r"layers=None.*layers=\[0\]"),
        ({"family": "roberta"}, BackboneError, r"was trained on the base '.*bert.*', and this one is '.*roberta"),
        ({"family": "roberta", "base_model_name_or_path": "SAME"}, BackboneError, "on a bert .* is a roberta"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, wrap: Wrap, trained: Any
) -> None:
    model, folder = trained("p_tuning_v2")
    if "base_model_name_or_path" in options:
        options = options | {"base_model_name_or_path": model.config.base_model_name_or_path}
    with pytest.raises(error, match=message):
        fresh(wrap, options.get("method", "p_tuning_v2"), folder, **{k: v for k, v in options.items() if k != "method"})


def test_bitfit_and_foreign_folders_are_refused(wrap: Wrap, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_adapter"):
        PTuneConfig(prompt_tuning_init="ADAPTER")
    with pytest.raises(ConfigError, match="bitfit does not have"):
        PTuneConfig(method="bitfit", prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter="x")
    _, folder = trained("bitfit")
    with pytest.raises(ConfigError, match="trained no prompt"):
        fresh(wrap, "p_tuning_v2", folder)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="hf-ptune convert"):
        fresh(wrap, "p_tuning_v2", str(foreign))


def test_a_prompt_without_the_base_that_it_was_trained_with_is_refused(wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "prompt_tuning", train_backbone=True).save_pretrained(tmp_path)
    for options in ({}, {"train_backbone": True}):
        with pytest.raises(BackboneError, match="trained together with its base"):
            fresh(wrap, "prompt_tuning", str(tmp_path), **options)
