"""A mix of all layers before the mean of a row's own tokens, under heads of encoders that pool."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODERS, assert_checkpoints_change_no_gradient, batch, build, compiles_several_hooks
from test_layer_mix import FURTHER, PROMPTED, Wrap, mixed, weighed, without_mix
from test_pooling import HEADS, padded
from test_train import write_base, write_recipe
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BigBirdConfig
from transformers.modeling_outputs import BaseModelOutput

import hf_ptune.sweep as sweep
from hf_ptune import LearningCallback, PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.arguments import make_arguments, settle_arguments
from hf_ptune.backbone import TASKS
from hf_ptune.data import load_rows
from hf_ptune.errors import ConfigError, InjectionError
from hf_ptune.fresh_base import load_tokenizer
from hf_ptune.info import describe_adapter
from hf_ptune.injection import gives_layers
from hf_ptune.interop import save_peft
from hf_ptune.multitask import get_multitask_model
from hf_ptune.recipe import make_recipe
from hf_ptune.train import make_trainer, run, wrap_base

BOTH = {"head_states": "mix", "pooling": "mean"}


def pooled(wrap: Wrap, family: str, method: str, task: str = "SEQ_CLS", **options: Any) -> PTunePreTrainedModel:
    """A wrapped model whose head reads the mean of the mix."""
    return mixed(wrap, family, method, task, pooling="mean", **options)


def means(model: PTunePreTrainedModel, plain: PTunePreTrainedModel, rows: list[Tensor]) -> Tensor:
    """The mix of every row by itself, without pads, and its mean over the row's tokens `[B, H]`."""
    body = plain.backbone.base_model
    states = [body(input_ids=row[None], output_hidden_states=True).hidden_states for row in rows]
    return torch.cat([weighed(model, layers).mean(1) for layers in states])


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", PROMPTED)
def test_equals_mix_and_mean_by_hand(family: str, method: str, wrap: Wrap) -> None:
    """Logits, and gradients of the mix and of the prompt, of rows that are padded to one length."""
    model = pooled(wrap, family, method)
    plain = without_mix(wrap, model, family, "SEQ_CLS", pooling="cls")
    ids, mask = padded(family, "right")
    rows = [row[real] for row, real in zip(ids, mask.bool(), strict=True)]
    expected = HEADS[family](plain.backbone, means(model, plain, rows))
    found = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found, expected, atol=1e-9)
    last = without_mix(wrap, model, family, "SEQ_CLS", pooling="mean")
    assert not torch.allclose(found, last(input_ids=ids, attention_mask=mask).logits, atol=1e-3)
    mix = list(model.mix.parameters())
    gradients = [
        torch.autograd.grad(logits.square().sum(), [*mix, *(p for p in m.prompt.parameters() if p.requires_grad)])
        for m, logits in ((model, found), (plain, expected))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().sum() > 0 and torch.allclose(mine, theirs, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_choices_are_pooled_each_by_itself(family: str, method: str, wrap: Wrap) -> None:
    model = pooled(wrap, family, method, "MULTIPLE_CHOICE")
    plain = without_mix(wrap, model, family, "MULTIPLE_CHOICE", pooling="cls")
    ids, mask = padded(family, "right")
    rows = [row[real] for row, real in zip(ids, mask.bool(), strict=True)]
    mean, head = means(model, plain, rows), plain.backbone
    if family == "distilbert":
        expected = head.classifier(head.pre_classifier(mean).relu())
    else:
        expected = head.classifier(head.base_model.pooler.dense(mean).tanh())
    found = model(input_ids=ids[None], attention_mask=mask[None]).logits
    assert torch.allclose(found, expected.T, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", PROMPTED)
def test_padding_and_other_rows_change_nothing(side: str, method: str, wrap: Wrap) -> None:
    model = pooled(wrap, "bert", method)
    ids, mask = padded("bert", side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    alone = [model(input_ids=row[real][None]).logits for row, real in zip(ids, mask.bool(), strict=True)]
    assert torch.allclose(found, torch.cat(alone), atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_what_a_caller_asks_for_is_given(family: str, method: str, wrap: Wrap) -> None:
    model = pooled(wrap, family, method)
    plain = without_mix(wrap, model, family, "SEQ_CLS", pooling="cls")
    ids = batch(family)["input_ids"]
    bare = model(input_ids=ids)
    assert "hidden_states" not in bare and bare.hidden_states is None
    states, theirs = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, plain))
    assert len(states) == len(theirs) and all(torch.equal(a, b) for a, b in zip(states, theirs, strict=True))
    listed = model(input_ids=ids, return_dict=False, output_hidden_states=True)
    assert isinstance(listed, tuple) and torch.equal(listed[0], bare.logits) and len(listed[1]) == len(states)
    embeds = model.get_input_embeddings()(ids)
    for inputs in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}):
        assert torch.allclose(model(**inputs).logits, bare.logits, atol=1e-12)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_the_pooled_state_keeps_its_place(asked: bool, return_dict: bool, wrap: Wrap) -> None:
    model, ids = pooled(wrap, "bert", "p_tuning_v2"), batch("bert")["input_ids"]
    body = model.backbone.bert
    whole = body(input_ids=ids, output_hidden_states=True)
    assert type(whole) is type(build("bert").bert(input_ids=ids))
    mix = weighed(model, whole.hidden_states)
    assert torch.allclose(whole[0][:, 0], mix.mean(1), atol=1e-12)
    assert torch.allclose(whole[0][:, 1:], mix[:, 1:], atol=1e-12)
    output = body(input_ids=ids, output_hidden_states=asked, return_dict=return_dict)
    assert isinstance(output, tuple) is not return_dict and len(output) == 2 + asked
    assert torch.equal(output[0], whole[0]) and torch.equal(output[1], body.pooler(whole[0]))


def test_a_mask_that_names_no_tokens_is_refused(wrap: Wrap) -> None:
    model, ids = pooled(wrap, "bert", "p_tuning_v2"), batch("bert")["input_ids"]
    with pytest.raises(InjectionError, match="4 axes"):
        model(input_ids=ids, attention_mask=torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]))


POOLERS = {name: config for name, config in FURTHER.items() if not name.startswith("xlnet")}
POOLERS["big_bird, whose pooler takes one state"] = BigBirdConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    attention_type="original_full",
)


@pytest.mark.parametrize("name", POOLERS)
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "MULTIPLE_CHOICE"])
def test_further_encoders(name: str, method: str, task: str) -> None:
    """What the base pools itself, of the mix put in the place of its encoder's last states."""
    torch.manual_seed(0)
    backbone = TASKS[task].from_config(POOLERS[name]).double().eval()
    shape = (2, 6) if task == "SEQ_CLS" else (1, 2, 6)
    ids = torch.randint(5, 99, shape)
    model = get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=4, **BOTH)).eval()
    found = model(input_ids=ids).logits
    body = model.backbone.base_model
    states = body(input_ids=ids.view(2, 6), output_hidden_states=True).hidden_states
    mean = weighed(model, states).mean(1, keepdim=True)
    base = model.unwrap()
    handle = body.encoder.register_forward_hook(lambda m, a, output: type(output)(last_hidden_state=mean))
    assert torch.allclose(base(input_ids=ids).logits, found, atol=1e-9)
    handle.remove()


@pytest.mark.parametrize("family", ENCODERS)
def test_turned_off_or_taken_away_the_base_reads_as_before(family: str, wrap: Wrap) -> None:
    model, ids = pooled(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    expected = build(family)
    expected.load_state_dict(model.backbone.state_dict())
    wanted = expected(input_ids=ids).logits
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-9)
    assert torch.allclose(model.unwrap()(input_ids=ids).logits, wanted, atol=1e-9)


@pytest.mark.parametrize("further", [None, ["bert.pooler"]])
def test_all_of_the_adapter_trains_and_nothing_else(further: list[str] | None, wrap: Wrap) -> None:
    model = pooled(wrap, "bert", "p_tuning_v2", modules_to_save=further).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(**batch("bert")).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == model.adapter_parameter_names() >= {"mix.weight", "mix.scale", "prompt.weight"}
    assert ("backbone.bert.pooler.dense.weight" in moved) or further is None


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method: str, reentrant: bool, wrap: Wrap) -> None:
    model, inputs = pooled(wrap, "bert", method).train(), batch("bert")
    assert_checkpoints_change_no_gradient(model, inputs, reentrant)


@compiles_several_hooks
def test_it_is_compiled_whole_and_can_be_pickled(wrap: Wrap) -> None:
    model = pooled(wrap, "bert", "p_tuning_v2")
    ids, mask = padded("bert", "right")
    expected = model(input_ids=ids, attention_mask=mask).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-9)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.allclose(twin(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-12)


@pytest.mark.parametrize("method", PROMPTED)
@pytest.mark.parametrize("flatten", [False, True])
def test_survives_the_disk(method: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model, inputs = pooled(wrap, "bert", method), batch("bert")
    model.save_pretrained(tmp_path, flatten=flatten)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert torch.allclose(loaded.mix.weight, model.mix.weight, atol=1e-6)
    assert "the head reads the mean of the own tokens in a mix of all layers" in describe_adapter(str(tmp_path))
    with pytest.raises(ConfigError, match="head_states='last'"):
        save_peft(model, tmp_path / "peft")


@pytest.mark.parametrize(
    ("family", "task", "method", "pooling", "asked", "has"),
    [
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", "auto_pairs", "mix"),
        ("bert", "MULTIPLE_CHOICE", "prompt_tuning", None, "auto_pairs", "mix"),
        ("roberta", "SEQ_CLS", "prefix_tuning", "mean", "auto_pairs", "mix"),
        ("bert", "TOKEN_CLS", "p_tuning_v2", "auto", "auto_pairs", "mix"),
        ("bert", "SEQ_CLS", "p_tuning_v2", "cls", "auto_pairs", "last"),
        ("bert", "SEQ_CLS", "p_tuning_v2", None, "auto_pairs", "last"),
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", "auto", "last"),
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", None, "last"),
        ("bert", "QUESTION_ANS", "p_tuning_v2", "auto", "auto_pairs", "last"),
        ("bert", "SEQ_CLS", "bitfit", "auto", "auto_pairs", "last"),
        ("gpt2", "SEQ_CLS", "p_tuning_v2", "auto", "auto_pairs", "last"),
        ("t5", None, "p_tuning_v2", "auto", "auto_pairs", "last"),
    ],
)
def test_who_has_it(
    family: str, task: str | None, method: str, pooling: str | None, asked: str | None, has: str, wrap: Wrap
) -> None:
    model = wrap(family, method, task, pooling=pooling, head_states=asked)
    assert model.config.head_states == has and (model.mix is None) == (has == "last")


def test_layers_of_unlike_size_are_mixed_only_where_asked() -> None:
    backbone = build("bert")
    with torch.no_grad():
        backbone.bert.embeddings.LayerNorm.weight.mul_(100)
    asked = {"method": "p_tuning_v2", "num_virtual_tokens": 4, "pooling": "mean"}
    model = get_ptune_model(backbone, PTuneConfig(**asked, head_states="auto_pairs"))
    assert model.config.head_states == "last"
    assert get_ptune_model(model.unwrap(), PTuneConfig(**asked, head_states="mix")).mix is not None


def test_a_pooler_that_cannot_be_run_again_has_no_mix() -> None:
    class Scaled(BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.pooler_output = output.pooler_output * 3
            return output

    class Silent(BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return BaseModelOutput(output.last_hidden_state, output.hidden_states)

    small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, vocab_size=99)
    assert gives_layers(BertModel(small), pooled=True)
    for other in (Scaled(small), Silent(small)):
        assert gives_layers(other) and not gives_layers(other, pooled=True)


def test_refused_before_the_first_token() -> None:
    for pooling in (None, "cls"):
        config = PTuneConfig(method="p_tuning_v2", pooling=pooling, head_states="mix")
        with pytest.raises(ConfigError, match="pooling is 'cls'.* Set pooling='mean', or leave head_states out"):
            get_ptune_model(build("bert"), config)


@pytest.mark.parametrize(
    ("family", "settings"), [("gpt2", {}), ("t5", {}), ("modernbert", {"classifier_pooling": "mean"})]
)
def test_refused_where_no_mean_could_be_asked_for(family: str, settings: dict[str, Any]) -> None:
    task = None if family == "t5" else "SEQ_CLS"
    with pytest.raises(ConfigError, match="is none of these. Leave it out"):
        get_ptune_model(build(family, task, **settings), PTuneConfig(method="p_tuning_v2", head_states="mix"))


def test_a_word_that_is_none_of_its_values() -> None:
    with pytest.raises(ConfigError, match="expected 'last', 'mix', 'auto', 'auto_pairs' or None"):
        PTuneConfig(head_states="pairs")
    with pytest.raises(ConfigError, match="expected 'cls', 'mean', 'auto' or None"):
        PTuneConfig(pooling="auto_pairs")


@pytest.mark.parametrize("asked", [{}, {"pooling": "auto"}, {"pooling": "auto", "head_states": "auto_pairs"}, BOTH])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_head_that_comes_along_brings_its_mix(method: str, asked: dict[str, str], wrap: Wrap, tmp_path: Path) -> None:
    source, inputs = pooled(wrap, "bert", method), batch("bert")
    source.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    model = wrap("bert", method, "SEQ_CLS", strong=False, prompt_tuning_init_head=True, **start, **asked)
    assert torch.allclose(model(**inputs).logits, source(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("asked", [{"pooling": "cls"}, {"head_states": "last"}])
def test_a_head_that_reads_something_else(asked: dict[str, str], wrap: Wrap, tmp_path: Path) -> None:
    pooled(wrap, "bert", "p_tuning_v2").save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    with pytest.raises(ConfigError, match="'mix', this one 'last'. Leave head_states and pooling out"):
        wrap("bert", "p_tuning_v2", "SEQ_CLS", prompt_tuning_init_head=True, **start, **asked)
    assert wrap("bert", "p_tuning_v2", "SEQ_CLS", **start, **asked).mix is None


@pytest.mark.parametrize(
    ("asked", "topic"),
    [(BOTH, "mix"), ({"head_states": "mix", "pooling": "auto"}, "mix"), ({"head_states": "mix"}, "last")],
)
def test_tasks_that_share_a_prompt_mix_for_themselves(asked: dict[str, str], topic: str) -> None:
    first, second, third = build("bert"), build("bert", "TOKEN_CLS"), build("bert", "MASKED_LM")
    for other in (second, third):
        other.base_model.load_state_dict(first.base_model.state_dict(), strict=False)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, **asked)
    model = get_multitask_model({"topic": first, "tags": second, "words": third}, config)
    assert [model.model_of(t).config.head_states for t in model.tasks] == [topic, "mix", "last"]
    assert ("tasks.topic.mix.weight" in model.adapter_parameter_names()) == (topic == "mix")
    output = model(task="topic", **batch("bert"))
    assert torch.isfinite(output.loss)


def of_pairs(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe whose rows have two texts, the second one in a column of another name."""
    content = write_recipe(folder, "SEQ_CLS", write_base(folder / "base", "bert", "SEQ_CLS"), **changes)
    rows = [json.loads(line) | {"second": "c d"} for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content["data"] = {"source": "pairs.jsonl", "columns": {"text_pair": "second"}}
    return content


@pytest.mark.parametrize("method", PROMPTED)
def test_recipes_mix_for_pairs_alone(method: str, tmp_path: Path) -> None:
    content = of_pairs(tmp_path, method=method)
    recipe = make_recipe(content, folder=tmp_path)
    tokenizer = load_tokenizer(recipe.base, None)

    def reading(**changes: Any) -> tuple[str, str]:
        changed = replace(recipe, **changes)
        config = wrap_base(changed, load_rows(changed), tokenizer).config
        return config.head_states, config.pooling

    assert reading() == ("mix", "mean")
    assert reading(data=replace(recipe.data, columns={})) == ("last", "mean")
    assert reading(options=recipe.options | {"head_states": "last"}) == ("last", "mean")
    assert reading(options=recipe.options | {"head_states": "auto"}) == ("last", "mean")
    assert reading(options=recipe.options | {"pooling": "cls"}) == ("last", "cls")
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("second", "text_pair"))
    assert reading(data=replace(recipe.data, columns={})) == ("mix", "mean")


@pytest.mark.parametrize(("named", "expected"), [({}, 2e-2), ({"learning_rate": 5e-3}, 5e-3)])
def test_pairs_have_a_learning_rate_of_their_own(named: dict[str, float], expected: float, tmp_path: Path) -> None:
    content = of_pairs(tmp_path)
    content["training"].pop("learning_rate", None)
    content["training"] |= named
    recipe = make_recipe(content, folder=tmp_path)
    tokenizer, rows = load_tokenizer(recipe.base, None), load_rows(recipe)
    arguments = settle_arguments(make_arguments(recipe), recipe, pairs=True, causal=False)
    trainer = make_trainer(recipe, arguments, wrap_base(recipe, rows, tokenizer), tokenizer, rows)
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {expected}
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LearningCallback))
    assert watch.usual == 2e-2
    facts = (run(recipe).folder / "README.md").read_text().replace("`", "")
    assert f"| learning_rate | {expected} |" in facts


def test_a_recipe_of_pairs_trains_its_mix_and_a_sweep_does_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = of_pairs(tmp_path)
    content["training"] |= {"max_steps": 3}
    recipe = make_recipe(content, folder=tmp_path)
    outcome = run(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(outcome.folder)
    assert model.config.head_states == "mix" and model.mix.weight.abs().sum() > 0
    assert "| head_states | mix |" in (outcome.folder / "README.md").read_text().replace("`", "")
    seen: list[nn.Module | None] = []
    make = sweep.make_trainer
    silent = replace(recipe, training={})
    assert sweep._around(sweep._usual_rate({"": silent}, {"": load_rows(recipe)})) == [2e-3, 6e-3, 2e-2, 6e-2]

    def watched(recipe: Any, arguments: Any, model: Any, *further: Any) -> Any:
        seen.append(model.mix)
        return make(recipe, arguments, model, *further)

    monkeypatch.setattr(sweep, "make_trainer", watched)
    found = sweep.sweep(recipe, tmp_path / "grid", [1e-2], [2])
    assert found.trials[0].error is None and len(seen) == 1 and seen[0] is not None
