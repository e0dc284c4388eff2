"""The vector that input prompts of encoders add to the first own token, which heads pool."""

import json
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
from hf_ptune.multitask import get_multitask_model

Wrap = Callable[..., PTunePreTrainedModel]


def by_hand(model: PTunePreTrainedModel, ids: Tensor, mask: Tensor, encoded: Tensor) -> Tensor:
    """States of each row's own tokens, by itself and without pads: [CLS] with the offset, virtual tokens, the rest."""
    plain = build("bert", "FEATURE_EXTRACTION")
    plain.load_state_dict(model.backbone.state_dict())
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        words = plain.get_input_embeddings()(row[real])
        embeds = torch.cat([words[:1] + encoded[-1], encoded[:-1], words[1:]])
        places = [0] * len(encoded) + list(range(1, len(words)))
        states = plain(inputs_embeds=embeds[None], position_ids=torch.tensor([places])).last_hidden_state[0]
        rows.append(torch.cat([states[:1], states[len(encoded) :]]))
    return torch.cat(rows)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_computation_by_hand(method: str, side: str, wrap: Wrap) -> None:
    model = wrap("bert", method, "FEATURE_EXTRACTION", first_token_offset=True)
    ids = batch("bert")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[mask.bool()]
    encoded = model.prompt().detach().requires_grad_()
    expected = by_hand(model, ids, mask, encoded)
    assert torch.allclose(found, expected, atol=1e-10)
    parameters = list(model.prompt.parameters())
    (gradient,) = torch.autograd.grad(expected.square().sum(), encoded)
    assert (gradient[-1].abs() > 0).any()
    wanted = torch.autograd.grad(model.prompt(), parameters, gradient)
    for mine, theirs in zip(torch.autograd.grad(found.square().sum(), parameters), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "task", "method", "rows"),
    [
        ("bert", "SEQ_CLS", "prompt_tuning", 5),
        ("bert", "MULTIPLE_CHOICE", "p_tuning", 5),
        ("roberta", "SEQ_CLS", "p_tuning", 5),
        ("bert", "TOKEN_CLS", "prompt_tuning", 4),
        ("bert", "MASKED_LM", "prompt_tuning", 4),
        ("llama", "SEQ_CLS", "prompt_tuning", 4),
        ("t5", None, "prompt_tuning", 4),
    ],
)
def test_pooled_tasks_of_encoders_have_it(family: str, task: str | None, method: str, rows: int, wrap: Wrap) -> None:
    model = wrap(family, method, task)
    assert len(model.prompt()) == rows and model.config.first_token_offset == (rows == 5)
    assert model.config.num_virtual_tokens == 4


@pytest.mark.parametrize("start", ["RANDOM", "ZERO", "SAMPLE_VOCAB"])
def test_starts_of_every_kind(start: str, wrap: Wrap) -> None:
    prompt = wrap("bert", "prompt_tuning", strong=False, prompt_tuning_init=start).prompt()
    assert len(prompt) == 5 and bool((prompt[-1] == 0).all()) == (start == "ZERO")


def test_it_can_be_left_out(wrap: Wrap) -> None:
    assert len(wrap("bert", "prompt_tuning", first_token_offset=False).prompt()) == 4
    assert len(wrap("bert", "prompt_tuning", "TOKEN_CLS", first_token_offset=True).prompt()) == 5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"method": "prompt_tuning"}),
        ("t5", {"method": "prompt_tuning"}),
        ("bert", {"method": "p_tuning_v2"}),
        ("bert", {"method": "prompt_tuning", "template": "[P2] {text} [MASK]"}),
    ],
)
def test_refused_where_it_has_no_place(family: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="first_token_offset=True"):
        get_ptune_model(build(family), PTuneConfig(**options, first_token_offset=True))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("flatten", [False, True])
def test_survives_the_disk(method: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model, inputs = wrap("bert", method), batch("bert")
    model.save_pretrained(tmp_path, flatten=flatten)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert "a vector added to the first own token" in describe_adapter(str(tmp_path))


def test_adapters_that_do_not_name_it_have_none(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", "prompt_tuning", first_token_offset=False)
    model.config.first_token_offset = None
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("first_token_offset", None)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(loaded.prompt()) == 4 and loaded.config.first_token_offset is False


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize(("had", "has"), [(False, True), (True, False)])
def test_another_adapter_starts_the_virtual_tokens(
    method: str, had: bool, has: bool, wrap: Wrap, tmp_path: Path
) -> None:
    source = wrap("bert", method, first_token_offset=had)
    source.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    model = wrap("bert", method, strong=False, first_token_offset=has, **start)
    assert torch.allclose(model.prompt()[:4], source.prompt()[:4], atol=1e-6)
    assert not has or (model.prompt()[4] == 0).all()


def test_tasks_of_several_kinds_share_a_prompt_without_it() -> None:
    first, second = build("bert"), build("bert", "TOKEN_CLS")
    second.base_model.load_state_dict(first.base_model.state_dict(), strict=False)
    model = get_multitask_model(
        {"topic": first, "tags": second}, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)
    )
    assert len(model.prompt()) == 4
