"""What scripts write into a wrapper's configuration, or give while loading, reaches the base, and comes back."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_ptune import (
    PTuneConfig,
    PTuneForCausalLM,
    PTuneForSequenceClassification,
    PTunePreTrainedModel,
    get_ptune_model,
)
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError

Wrap = Callable[..., PTunePreTrainedModel]


def test_pads_are_told_by_the_id_that_a_script_sets(wrap: Wrap) -> None:
    model = wrap("gpt2", "p_tuning_v2", "SEQ_CLS")
    ids = batch("gpt2")["input_ids"][:2].clamp(max=90)
    model.config.pad_token_id = 98
    assert model.backbone.config.pad_token_id == 98
    padded = torch.cat([ids, ids.new_full((2, 3), 98)], 1)
    mask = torch.cat([torch.ones_like(ids), ids.new_zeros(2, 3)], 1)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=row[None]).logits for row in ids])
        assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits, expected, atol=1e-8)


def test_what_a_trainer_takes_from_the_tokenizer_reaches_the_base(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("gpt2", "p_tuning_v2", "SEQ_CLS")
    model.config.get_text_config().pad_token_id = 98
    assert model.config.pad_token_id == model.backbone.config.pad_token_id == 98
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.pad_token_id == loaded.backbone.config.pad_token_id == 98


def test_the_kind_of_problem_decides_the_loss(wrap: Wrap) -> None:
    model, ids = wrap("bert", "p_tuning_v2"), batch("bert")["input_ids"][:2]
    model.config.problem_type = "regression"
    wanted = torch.randn(2, model.config.num_labels, dtype=torch.float64)
    output = model(input_ids=ids, labels=wanted)
    assert torch.allclose(output.loss, torch.nn.functional.mse_loss(output.logits, wanted))


def test_a_loss_of_a_script_finds_the_number_of_labels(wrap: Wrap) -> None:
    model = wrap("bert", "p_tuning_v2", num_virtual_tokens=3)
    assert model.num_labels == model.backbone.num_labels == 2
    logits = model(input_ids=batch("bert")["input_ids"]).logits
    assert logits.view(-1, model.num_labels).shape == logits.shape
    model.num_labels = 5
    assert model.backbone.num_labels == 5
    assert not hasattr(wrap("gpt2", "p_tuning_v2"), "num_labels")


def test_labels_named_after_wrapping_are_saved(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", "p_tuning_v2")
    names = [f"topic {n}" for n in range(model.config.num_labels)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: n for n, name in enumerate(names)}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for config in (loaded.config, loaded.backbone.config):
        assert list(config.id2label.values()) == names and config.label2id["topic 1"] == 1


def edit(folder: Path, **values: Any) -> Path:
    """Write into a config.json as a person does, a field that is `None` being left out."""
    settings = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


NAMED = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
DRAWN = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
EDITS: dict[str, tuple[Any, Any]] = {
    "names alone": ({"id2label": {"0": "no", "1": "yes"}}, ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})),
    "names and numbers": (
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1, "sure": 1}},
        ({0: "no", 1: "yes"}, {"no": 0, "yes": 1, "sure": 1}),
    ),
    "numbers alone": ({"label2id": {"bad": 0, "fine": 1}}, (NAMED["id2label"], {"bad": 0, "fine": 1})),
    "nothing": ({}, (NAMED["id2label"], NAMED["label2id"])),
    "left out": ({"id2label": None, "label2id": None}, (NAMED["id2label"], NAMED["label2id"])),
    "without a name": (DRAWN, (NAMED["id2label"], NAMED["label2id"])),
}


@pytest.mark.parametrize("kind", EDITS)
def test_labels_named_in_config_json_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    values, expected = EDITS[kind]
    build("bert", num_labels=2, **NAMED).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=2)).save_pretrained(tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(edit(tmp_path / "adapter", **values))
    model.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    for config in (model.config, model.backbone.config, model.config.base, again, again.base):
        assert (config.id2label, config.label2id) == expected


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("names", [{"0": "kind"}, {"0": "a", "1": "b", "2": "c"}, {"1": "a", "2": "b"}], ids=str)
def test_labels_in_config_json_that_the_head_does_not_have_are_refused(
    names: dict[str, str], named: bool, wrap: Wrap, tmp_path: Path
) -> None:
    model = wrap("bert", "p_tuning_v2")
    if named:
        model.config.id2label = NAMED["id2label"]
    model.save_pretrained(tmp_path)
    counted = named or {*names} == {"1", "2"}
    message = "id2label in config.json .* labels of the head, 0 to 1" if counted else "other shapes .*classifier"
    with pytest.raises(ConfigError if counted else AdapterFileError, match=message):
        AutoModelForSequenceClassification.from_pretrained(edit(tmp_path, id2label=names))


def test_labels_beside_a_base_that_names_none_are_those_of_the_head(tmp_path: Path) -> None:
    """As after a base_config that was lost, and put back from the base itself."""
    build("bert", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=2)).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "config.json").read_text())["base_config"]
    plain = {k: v for k, v in settings.items() if k not in ("id2label", "label2id")}
    model = AutoModelForSequenceClassification.from_pretrained(edit(tmp_path / "adapter", base_config=plain))
    assert model.config.id2label == model.backbone.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_labels_of_a_language_model_mean_nothing(wrap: Wrap, tmp_path: Path) -> None:
    wrap("llama", "p_tuning_v2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(edit(tmp_path, id2label={"0": "kind"}))
    assert model.config.id2label == model.backbone.config.id2label


def test_a_copy_of_the_configuration_writes_into_no_base(wrap: Wrap) -> None:
    model = wrap("bert", "p_tuning_v2")
    deepcopy(model.config).pad_token_id = 7
    assert model.backbone.config.pad_token_id != 7
    twin = deepcopy(model)
    twin.config.pad_token_id = 9
    assert twin.backbone.config.pad_token_id == 9 and model.backbone.config.pad_token_id != 9
    assert "_live" not in model.config.to_dict() and "_live" not in model.config.to_json_string()


@pytest.mark.parametrize("loader", [AutoModelForSequenceClassification, PTuneForSequenceClassification])
def test_options_of_loading_reach_the_base(loader: Any, wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "p_tuning_v2").save_pretrained(tmp_path)
    model = loader.from_pretrained(
        tmp_path, dtype=torch.bfloat16, hidden_dropout_prob=0.3, output_hidden_states=True, use_cache=False
    )
    assert model.backbone.dtype == torch.bfloat16
    assert {m.p for m in model.backbone.bert.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.3}
    assert model(input_ids=batch("bert")["input_ids"]).hidden_states is not None
    assert model.backbone.config.use_cache is False


def test_what_is_set_on_a_configuration_before_loading_reaches_the_base(wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "p_tuning_v2").save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    config.pad_token_id = 7
    config.update({"hidden_dropout_prob": 0.3, "output_hidden_states": True})
    config.id2label = {0: "no", 1: "yes"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", config=config)
    model.save_pretrained(tmp_path / "again")
    config.save_pretrained(tmp_path / "alone")
    read = AutoConfig.from_pretrained(tmp_path / "alone")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    for told in (model.config, model.backbone.config, loaded.config, loaded.backbone.config, read, read.base):
        assert (told.pad_token_id, told.hidden_dropout_prob, told.output_hidden_states) == (7, 0.3, True)
        assert told.id2label == {0: "no", 1: "yes"}
    assert {m.p for m in model.backbone.bert.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.3}
    assert model(input_ids=batch("bert")["input_ids"]).hidden_states is not None


def test_a_base_runs_its_feed_forward_in_chunks_where_that_is_asked_for(wrap: Wrap, tmp_path: Path) -> None:
    model, ids = wrap("bert", "p_tuning_v2").float(), batch("bert")["input_ids"][:, :4]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, chunk_size_feed_forward=2)
    assert {layer.chunk_size_feed_forward for layer in loaded.backbone.bert.encoder.layer} == {2}
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_a_size_that_the_base_does_not_have_may_be_the_callers(wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "p_tuning_v2").save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="hidden_size=64 instead of 32.*correct what was given besides"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, hidden_size=64)


def test_the_configuration_of_a_wrapped_base_loads_what_was_set_on_it(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", "p_tuning_v2")
    model.save_pretrained(tmp_path)
    model.config.hidden_dropout_prob = 0.3
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=model.config)
    assert loaded.backbone.config.hidden_dropout_prob == 0.3


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, PTuneForCausalLM])
def test_an_adapter_generates_as_it_was_saved(loader: Any, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("llama", "p_tuning_v2")
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.eos_token_id) == (3, 7)
    ids = batch("llama")["input_ids"][:1]
    assert loaded.generate(ids).shape[1] <= ids.shape[1] + 3
    (tmp_path / "generation_config.json").unlink()
    assert loader.from_pretrained(tmp_path).generation_config.max_new_tokens is None
