"""What heads of encoders pool: the mean of a row's own tokens in place of the first one's state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODERS, assert_checkpoints_change_no_gradient, batch, build
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BigBirdConfig,
    ElectraConfig,
    FunnelConfig,
    MPNetConfig,
    PretrainedConfig,
    XLNetConfig,
)

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import ConfigError, InjectionError
from hf_ptune.info import describe_adapter
from hf_ptune.interop import prompt_embeds, save_peft
from hf_ptune.multitask import get_multitask_model

Wrap = Callable[..., PTunePreTrainedModel]
PROMPTED = ["prompt_tuning", "p_tuning", "p_tuning_v2", "prefix_tuning"]
HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda m, x: m.classifier(m.bert.pooler.dense(x).tanh()),
    "roberta": lambda m, x: m.classifier.out_proj(m.classifier.dense(x).tanh()),
    "deberta-v2": lambda m, x: m.classifier(torch.nn.functional.gelu(m.pooler.dense(x))),
    "modernbert": lambda m, x: m.classifier(m.head(x)),
    "distilbert": lambda m, x: m.classifier(m.pre_classifier(x).relu()),
}


def padded(family: str, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, S]`, the first row two tokens shorter."""
    ids = batch(family)["input_ids"].clone()
    mask = torch.ones_like(ids)
    pads = slice(0, 2) if side == "left" else slice(-2, None)
    mask[0, pads] = 0
    ids[0, pads] = 1 if family == "roberta" else 0
    return ids, mask


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", PROMPTED)
def test_equals_the_mean_by_hand(family: str, method: str, wrap: Wrap) -> None:
    """States of each row by itself, without pads; their mean goes through the head's own layers."""
    model, plain = wrap(family, method, pooling="mean"), wrap(family, method, pooling="cls")
    plain.load_adapter_state_dict(model.adapter_state_dict())
    ids, mask = padded(family, "right")
    rows = [row[real] for row, real in zip(ids, mask.bool(), strict=True)]
    means = [plain.backbone.base_model(input_ids=row[None]).last_hidden_state.mean(1) for row in rows]
    expected = torch.cat([HEADS[family](plain.backbone, mean) for mean in means])
    found = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.allclose(found, plain(input_ids=ids, attention_mask=mask).logits, atol=1e-3)
    gradients = [
        torch.autograd.grad(logits.square().sum(), [p for p in m.prompt.parameters() if p.requires_grad])
        for m, logits in ((model, found), (plain, expected))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().sum() > 0 and torch.allclose(mine, theirs, atol=1e-8)


@pytest.mark.parametrize("method", PROMPTED)
def test_padding_on_the_left_changes_nothing(method: str, wrap: Wrap) -> None:
    model = wrap("bert", method, pooling="mean")
    ids, mask = padded("bert", "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:1]
    assert torch.allclose(found, model(input_ids=ids[:1, 2:]).logits, atol=1e-9)


@pytest.mark.parametrize("family", ENCODERS)
def test_turned_off_or_taken_away_the_base_reads_as_before(family: str, wrap: Wrap) -> None:
    model, ids = wrap(family, "p_tuning_v2", pooling="mean"), batch(family)["input_ids"]
    expected = build(family)(input_ids=ids).logits
    with model.disable_adapter(), torch.no_grad():
        model.backbone.classifier.load_state_dict(build(family).classifier.state_dict())
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-9)
    backbone = model.unwrap()
    assert torch.allclose(backbone(input_ids=ids).logits, expected, atol=1e-9)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_embeddings_tuples_and_no_mask(family: str, return_dict: bool, wrap: Wrap) -> None:
    model, ids = wrap(family, "prompt_tuning", pooling="mean"), batch(family)["input_ids"]
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    embeds = model.get_input_embeddings()(ids)
    options = {"return_dict": return_dict, "output_hidden_states": True}
    output = model(inputs_embeds=embeds, **options)
    assert torch.allclose(output[0], expected, atol=1e-9)
    assert all(h.shape[1] == ids.shape[1] for h in output[1])


def test_a_mask_that_names_no_tokens_is_refused(wrap: Wrap) -> None:
    model, ids = wrap("bert", "p_tuning_v2", pooling="mean"), batch("bert")["input_ids"]
    with pytest.raises(InjectionError, match="4 axes"):
        model(input_ids=ids, attention_mask=torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]))
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, model.unwrap()(input_ids=ids, attention_mask=mask).logits)


_SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FURTHER: dict[str, PretrainedConfig] = {
    "albert, whose pooler takes one state": AlbertConfig(**_SMALL, embedding_size=16, intermediate_size=37),
    "big_bird, whose pooler does so too": BigBirdConfig(**_SMALL, intermediate_size=37, attention_type="original_full"),
    "electra": ElectraConfig(**_SMALL, embedding_size=16, intermediate_size=37),
    "mpnet": MPNetConfig(**_SMALL, intermediate_size=37),
}


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_further_encoders_read_all_own_tokens_and_no_pads(name: str, method: str) -> None:
    torch.manual_seed(0)
    backbone = AutoModelForSequenceClassification.from_config(FURTHER[name]).double().eval()
    model = get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=4, pooling="auto")).eval()
    assert model.config.pooling == "mean"
    model.prompt.weight.data.normal_(0, 0.5)
    ids = torch.randint(5, 99, (2, 6))
    states: list[Tensor] = []
    handle = model.backbone.base_model.encoder.register_forward_hook(
        lambda m, a, output: states.append(output[0]), prepend=True
    )
    logits = model(input_ids=ids).logits
    handle.remove()
    gradient = torch.autograd.grad(logits.square().sum(), states[0])[0].abs().sum(-1)
    virtual = 4 if method == "prompt_tuning" else 0
    assert ((gradient[:, : 6 + virtual] > 0).sum(1) == 6).all() and not gradient[:, 6 + virtual :].any()
    more = torch.cat([ids, ids.new_full((2, 3), model.config.base.pad_token_id)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long)], 1)
    assert torch.allclose(model(input_ids=more, attention_mask=mask).logits, logits, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "task", "method", "asked", "has"),
    [
        ("bert", "SEQ_CLS", "prompt_tuning", None, "mean"),
        ("bert", "MULTIPLE_CHOICE", "p_tuning", None, "mean"),
        ("roberta", "MULTIPLE_CHOICE", "p_tuning_v2", "auto", "mean"),
        ("roberta", "SEQ_CLS", "p_tuning", None, "mean"),
        ("bert", "SEQ_CLS", "prompt_tuning", "cls", "cls"),
        ("bert", "SEQ_CLS", "p_tuning_v2", None, "cls"),
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", "mean"),
        ("bert", "SEQ_CLS", "bitfit", "auto", "cls"),
        ("bert", "TOKEN_CLS", "prompt_tuning", None, "cls"),
        ("bert", "TOKEN_CLS", "p_tuning_v2", "auto", "cls"),
        ("bert", "MASKED_LM", "prompt_tuning", None, "cls"),
        ("llama", "SEQ_CLS", "prompt_tuning", "auto", "cls"),
        ("llama", "SEQ_CLS", "p_tuning_v2", "auto", "cls"),
        ("t5", None, "p_tuning_v2", "auto", "cls"),
    ],
)
def test_who_has_it(family: str, task: str | None, method: str, asked: Any, has: str, wrap: Wrap) -> None:
    assert wrap(family, method, task, pooling=asked).config.pooling == has


def test_bases_that_pool_the_mean_themselves_are_left_alone() -> None:
    backbone = build("modernbert", classifier_pooling="mean")
    model = get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", pooling="auto"))
    assert model.config.pooling == "cls"


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_choices_are_pooled_each_by_itself(method: str, wrap: Wrap) -> None:
    model = wrap("bert", method, "MULTIPLE_CHOICE", pooling="mean")
    ids, mask = padded("bert", "right")
    together = model(input_ids=ids[None], attention_mask=mask[None]).logits[0]
    for number in range(len(ids)):
        row = ids[number][mask[number].bool()]
        assert torch.allclose(model(input_ids=row[None, None]).logits[0, 0], together[number], atol=1e-9)


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("llama", "SEQ_CLS", {"method": "prompt_tuning"}),
        ("t5", None, {"method": "prompt_tuning"}),
        ("bert", "TOKEN_CLS", {"method": "p_tuning_v2"}),
        ("bert", "SEQ_CLS", {"method": "bitfit"}),
        ("bert", "SEQ_CLS", {"method": "prompt_tuning", "template": "[P2] {text} [MASK]"}),
    ],
)
def test_refused_where_no_head_reads_the_first_token(family: str, task: str | None, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pooling='mean'"):
        get_ptune_model(build(family, task), PTuneConfig(**options, pooling="mean"))


def test_refused_where_the_head_reads_the_last_token() -> None:
    small = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37}
    backbone = AutoModelForSequenceClassification.from_config(XLNetConfig(**small))
    with pytest.raises(ConfigError, match="XLNetForSequenceClassification does not do so"):
        get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", pooling="mean"))


def test_states_that_are_fewer_than_the_tokens_have_no_mean_of_these() -> None:
    """Funnel gives half as many states behind every block."""
    torch.manual_seed(0)
    small = {"vocab_size": 99, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 36, "initializer_std": 0.3}
    backbone = AutoModelForSequenceClassification.from_config(FunnelConfig(**small, block_sizes=[1, 1])).eval()
    with pytest.raises(ConfigError, match="FunnelForSequenceClassification does not do so"):
        get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", pooling="mean"))
    assert get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", pooling="auto")).config.pooling == "cls"


def test_masks_of_three_axes_reach_the_base_while_the_prompt_is_off(wrap: Wrap) -> None:
    model, ids = wrap("bert", "p_tuning_v2", pooling="mean"), batch("bert")["input_ids"]
    with model.disable_adapter():
        found = model(ids, attention_mask=torch.ones(2, 7, 7, dtype=torch.long)).logits
        assert torch.allclose(found, model(ids).logits)
    with pytest.raises(InjectionError, match="3 axes"):
        model(ids, attention_mask=torch.ones(2, 7, 7, dtype=torch.long))


def test_a_word_that_is_none_of_its_values() -> None:
    with pytest.raises(ConfigError, match="expected 'cls', 'mean'"):
        PTuneConfig(pooling="max")


@pytest.mark.parametrize("method", PROMPTED)
@pytest.mark.parametrize("flatten", [False, True])
def test_survives_the_disk(method: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model, inputs = wrap("bert", method, pooling="mean"), batch("bert")
    model.save_pretrained(tmp_path, flatten=flatten)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert "the head reads the mean of the own tokens" in describe_adapter(str(tmp_path))


@pytest.mark.parametrize("left", ['"pooling": null', '"pooling": "auto"'])
def test_adapters_that_do_not_name_it_read_the_first_token(left: str, wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "prompt_tuning", pooling="cls").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"pooling": "cls"' in text
    (tmp_path / "config.json").write_text(text.replace('"pooling": "cls"', left))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.pooling == "cls"


@pytest.mark.parametrize("had", ["cls", "mean"])
@pytest.mark.parametrize("asked", [None, "auto"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_head_that_comes_along_reads_what_it_has_learnt_to_read(
    method: str, asked: str | None, had: str, wrap: Wrap, tmp_path: Path
) -> None:
    source, inputs = wrap("bert", method, pooling=had), batch("bert")
    source.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    model = wrap("bert", method, strong=False, pooling=asked, prompt_tuning_init_head=True, **start)
    assert model.config.pooling == had
    assert torch.allclose(model(**inputs).logits, source(**inputs).logits, atol=1e-5)
    fresh = "cls" if (method, asked) == ("p_tuning_v2", None) else "mean"
    assert wrap("bert", method, strong=False, pooling=asked, **start).config.pooling == fresh


@pytest.mark.parametrize("asked", [None, "auto", "mean", "cls"])
def test_tasks_that_share_a_prompt_pool_for_themselves(asked: str | None) -> None:
    first, second = build("bert"), build("bert", "TOKEN_CLS")
    second.base_model.load_state_dict(first.base_model.state_dict(), strict=False)
    config = PTuneConfig(method="prompt_tuning", num_virtual_tokens=4, pooling=asked)
    model = get_multitask_model({"topic": first, "tags": second}, config)
    assert model.model_of("topic").config.pooling == ("cls" if asked == "cls" else "mean")
    assert model.model_of("tags").config.pooling == "cls"


def test_other_formats_have_no_such_pooling(wrap: Wrap, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooling='cls'"):
        save_peft(wrap("bert", "p_tuning_v2", pooling="mean"), tmp_path / "peft")
    with pytest.raises(ConfigError, match="pooling='cls'"):
        prompt_embeds(wrap("bert", "prompt_tuning", pooling="mean"))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method: str, reentrant: bool, wrap: Wrap) -> None:
    model, inputs = wrap("bert", method, pooling="mean").train(), batch("bert")
    assert_checkpoints_change_no_gradient(model, inputs, reentrant)
