"""The virtual token that heads of encoders pool in place of the first own token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, build
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import ConfigError
from hf_ptune.info import describe_adapter
from hf_ptune.interop import save_peft
from hf_ptune.multitask import get_multitask_model

Wrap = Callable[..., PTunePreTrainedModel]
ENCODERS = ["bert", "roberta", "deberta-v2", "modernbert", "distilbert"]


def by_hand(model: PTunePreTrainedModel, ids: Tensor, mask: Tensor, prompt: Tensor, pooled: Tensor) -> Tensor:
    """States of each row's own tokens, by itself and without pads; the first one's are those of the pooled token.

    The sequence is pooled token, [CLS], virtual tokens, all at position 0, and the rest from position 1 on.
    """
    plain = build("bert", "FEATURE_EXTRACTION")
    plain.load_state_dict(model.backbone.state_dict())
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        words = plain.get_input_embeddings()(row[real])
        embeds = torch.cat([pooled, words[:1], prompt, words[1:]])
        places = [0] * (len(prompt) + 1) + list(range(len(words)))
        states = plain(inputs_embeds=embeds[None], position_ids=torch.tensor([places])).last_hidden_state[0]
        rows.append(torch.cat([states[:1], states[2 + len(prompt) :]]))
    return torch.cat(rows)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_computation_by_hand(method: str, side: str, wrap: Wrap) -> None:
    model = wrap("bert", method, "FEATURE_EXTRACTION", pooled_token=True)
    assert model.pooled_token is not None and model.prompt is not None
    ids = batch("bert")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[mask.bool()]
    encoded, pooled = model.prompt().detach().requires_grad_(), model.pooled_token().detach().requires_grad_()
    expected = by_hand(model, ids, mask, encoded, pooled)
    assert torch.allclose(found, expected, atol=1e-10)
    parameters = [*model.prompt.parameters(), model.pooled_token.weight]
    gradients = torch.autograd.grad(expected.square().sum(), [encoded, pooled])
    assert (gradients[1].abs() > 0).any()
    wanted = torch.autograd.grad([model.prompt(), model.pooled_token()], parameters, gradients)
    for mine, theirs in zip(torch.autograd.grad(found.square().sum(), parameters), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


def test_beside_a_prefix_it_is_one_more_token_of_the_row(wrap: Wrap) -> None:
    """Written into the row as an own token at [CLS]'s position, with [CLS] after it."""
    with_token = wrap("bert", "p_tuning_v2", pooled_token=True)
    plain = wrap("bert", "p_tuning_v2")
    assert plain.pooled_token is None and with_token.pooled_token is not None
    plain.load_adapter_state_dict(
        {n: t for n, t in with_token.adapter_state_dict().items() if not n.startswith("pooled_token")}
    )
    ids = batch("bert")["input_ids"]
    words = plain.get_input_embeddings()(ids)
    embeds = torch.cat([with_token.pooled_token().expand(len(ids), 1, -1), words], 1)
    places = torch.tensor([[0, *range(ids.shape[1])]])
    expected = plain(inputs_embeds=embeds, position_ids=places).logits
    assert torch.allclose(with_token(input_ids=ids).logits, expected, atol=1e-10)
    assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
def test_outputs_keep_their_shapes_and_padding_changes_nothing(family: str, method: str, wrap: Wrap) -> None:
    model = wrap(family, method, pooled_token=True)
    ids = batch(family)["input_ids"][:1]
    padded = torch.cat([ids, ids.new_full((1, 3), model.config.base.pad_token_id or 0)], 1)
    mask = torch.cat([torch.ones_like(ids), ids.new_zeros(1, 3)], 1)
    output = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
    assert torch.allclose(output.logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-8)
    assert all(h.shape[1] == padded.shape[1] for h in output.hidden_states)
    output.logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.pooled_token.parameters())
    with model.disable_adapter(), torch.no_grad():
        base = model.backbone(input_ids=ids).logits
    model.unwrap()
    assert torch.equal(base, model.backbone(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("family", "task", "method", "asked", "has"),
    [
        ("bert", "SEQ_CLS", "prompt_tuning", None, True),
        ("bert", "MULTIPLE_CHOICE", "p_tuning", None, True),
        ("roberta", "SEQ_CLS", "p_tuning", None, True),
        ("bert", "SEQ_CLS", "prompt_tuning", False, False),
        ("bert", "SEQ_CLS", "p_tuning_v2", None, False),
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", True),
        ("bert", "SEQ_CLS", "bitfit", "auto", False),
        ("bert", "TOKEN_CLS", "prompt_tuning", None, False),
        ("bert", "TOKEN_CLS", "p_tuning_v2", "auto", False),
        ("bert", "MASKED_LM", "prompt_tuning", None, False),
        ("llama", "SEQ_CLS", "prompt_tuning", "auto", False),
        ("llama", "SEQ_CLS", "p_tuning_v2", "auto", False),
        ("t5", None, "p_tuning_v2", "auto", False),
    ],
)
def test_who_has_it(family: str, task: str | None, method: str, asked: Any, has: bool, wrap: Wrap) -> None:
    model = wrap(family, method, task, pooled_token=asked)
    assert model.config.pooled_token is has and (model.pooled_token is not None) == has
    assert ("pooled_token.weight" in model.adapter_parameter_names()) == has


def test_it_starts_at_the_separator_as_large_as_a_prompt() -> None:
    backbone = build("bert")
    backbone.config.sep_token_id = 7
    model = get_ptune_model(backbone, PTuneConfig(method="prompt_tuning"))
    row = model.get_input_embeddings().weight[7]
    assert torch.allclose(model.pooled_token()[0].double(), row / row.std(), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"method": "prompt_tuning"}),
        ("t5", {"method": "prompt_tuning"}),
        ("bert", {"method": "bitfit"}),
        ("bert", {"method": "prompt_tuning", "template": "[P2] {text} [MASK]"}),
    ],
)
def test_refused_where_it_has_no_place(family: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pooled_token=True"):
        get_ptune_model(build(family), PTuneConfig(**options, pooled_token=True))


def test_a_word_that_is_none_of_its_values() -> None:
    with pytest.raises(ConfigError, match="expected True, False, 'auto'"):
        PTuneConfig(pooled_token="always")


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("flatten", [False, True])
def test_survives_the_disk(method: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model, inputs = wrap("bert", method, pooled_token=True), batch("bert")
    model.save_pretrained(tmp_path, flatten=flatten)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert "and one that the head pools" in describe_adapter(str(tmp_path))


def test_adapters_that_do_not_name_it_have_none(wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "prompt_tuning", pooled_token=False).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"pooled_token": false', '"pooled_token": null'))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.pooled_token is None and loaded.config.pooled_token is False


@pytest.mark.parametrize(("had", "has"), [(False, True), (True, False), (True, True)])
def test_another_adapter_starts_it(had: bool, has: bool, wrap: Wrap, tmp_path: Path) -> None:
    source = wrap("bert", "prompt_tuning", pooled_token=had)
    source.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    model = wrap("bert", "prompt_tuning", strong=False, pooled_token=has, prompt_tuning_init_head=True, **start)
    assert torch.allclose(model.prompt(), source.prompt(), atol=1e-6)
    if had and has:
        assert torch.allclose(model.pooled_token(), source.pooled_token(), atol=1e-6)
    asked = wrap("bert", "prompt_tuning", strong=False, pooled_token="auto", **start)
    assert asked.config.pooled_token is had  # so that a head which comes along reads what it has learnt to read


def test_tasks_share_a_prompt_without_it() -> None:
    first, second = build("bert"), build("bert", "TOKEN_CLS")
    second.base_model.load_state_dict(first.base_model.state_dict(), strict=False)
    backbones = {"topic": first, "tags": second}
    model = get_multitask_model(backbones, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4))
    assert all(model.model_of(name).pooled_token is None for name in backbones)
    with pytest.raises(ConfigError, match="leave it out"):
        get_multitask_model({"topic": build("bert")}, PTuneConfig(method="prompt_tuning", pooled_token=True))


def test_peft_has_no_such_token(wrap: Wrap, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooled_token=False"):
        save_peft(wrap("bert", "p_tuning_v2", pooled_token=True), tmp_path / "peft")


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method: str, reentrant: bool, wrap: Wrap) -> None:
    model, inputs = wrap("bert", method, pooled_token=True).train(), batch("bert")
    parameters = [p for n, p in model.named_parameters() if n in model.adapter_parameter_names()]
    wanted = torch.autograd.grad(model(**inputs).loss, parameters)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, atol=1e-9)
