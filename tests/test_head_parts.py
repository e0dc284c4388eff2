"""What a wrapper adds to its base's head, a mix of layers or a window: brought along, shared, and trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import batch, build
from torch import nn
from transformers import TrainingArguments

from hf_ptune import PTuneConfig, PTunePreTrainedModel
from hf_ptune.errors import ConfigError
from hf_ptune.multitask import get_multitask_model
from hf_ptune.optimizer import make_optimizer

Wrap = Callable[..., PTunePreTrainedModel]
# option -> as in the papers, the other value, the part that comes with it, and what a message says to leave out
PARTS = {
    "head_states": ("last", "mix", "mix", "head_states and pooling"),
    "head_window": ("token", "neighbours", "window", "head_window"),
}
ASKED = [(option, asked) for option, (_, other, *_) in PARTS.items() for asked in (None, "auto", other)]


def moved(model: PTunePreTrainedModel, option: str) -> nn.Module:
    """The part of an option, no longer as it starts."""
    part: nn.Module = getattr(model, PARTS[option][2])
    torch.manual_seed(5)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=2)
    return part


@pytest.mark.parametrize(("option", "asked"), ASKED)
def test_a_head_that_comes_along_brings_it(option: str, asked: str | None, wrap: Wrap, tmp_path: Path) -> None:
    source, ids = wrap("bert", "p_tuning_v2", "TOKEN_CLS", **{option: PARTS[option][1]}), batch("bert")["input_ids"]
    moved(source, option)
    source.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    start |= {"prompt_tuning_init_head": True, option: asked}
    model = wrap("bert", "p_tuning_v2", "TOKEN_CLS", strong=False, **start)
    assert torch.allclose(model(input_ids=ids).logits, source(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("option", PARTS)
@pytest.mark.parametrize("back", [False, True])
def test_a_head_that_reads_something_else(option: str, back: bool, wrap: Wrap, tmp_path: Path) -> None:
    had, asked = PARTS[option][:2] if back else PARTS[option][1::-1]
    wrap("bert", "p_tuning_v2", "TOKEN_CLS", **{option: had}).save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path), option: asked}
    cure = f"Leave {PARTS[option][3]} out"
    with pytest.raises(ConfigError, match=f"reads {option}='{had}', this one '{asked}'. {cure}"):
        wrap("bert", "p_tuning_v2", "TOKEN_CLS", prompt_tuning_init_head=True, **start)
    model = wrap("bert", "p_tuning_v2", "TOKEN_CLS", **start)
    assert getattr(model.config, option) == asked


@pytest.mark.parametrize(("option", "asked"), ASKED)
def test_tasks_that_share_a_prompt_have_it_for_themselves(option: str, asked: str | None, tmp_path: Path) -> None:
    published, other, name, _ = PARTS[option]
    first, second = build("bert"), build("bert", "TOKEN_CLS")
    second.base_model.load_state_dict(first.base_model.state_dict(), strict=False)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, **{option: asked})
    model = get_multitask_model({"topic": first, "tags": second}, config)
    assert getattr(model.model_of("topic").config, option) == published
    assert getattr(model.model_of("tags").config, option) == (published if asked is None else other)
    if asked is None:
        return
    assert f"tasks.tags.{name}.weight" in model.adapter_parameter_names()
    part = moved(model.model_of("tags"), option)
    model.save_pretrained(tmp_path)
    kept = part.weight.clone()
    with torch.no_grad():
        part.weight.zero_()
    model.load_adapters(tmp_path)
    assert torch.equal(part.weight, kept)


@pytest.mark.parametrize("option", PARTS)
def test_it_takes_the_rate_of_the_head(option: str, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", "prefix_tuning", "TOKEN_CLS", **{option: PARTS[option][1]})
    made = make_optimizer(TrainingArguments(str(tmp_path), learning_rate=1e-3), model, head_learning_rate=2e-2)
    assert made is not None
    rates = {id(p): group["lr"] for group in made[1]["params"] for p in group["params"]}
    assert {rates[id(p)] for p in moved(model, option).parameters()} == {2e-2}
    assert {rates[id(p)] for p in model.prompt.parameters() if p.requires_grad} == {1e-3}
