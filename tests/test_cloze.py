"""Cloze prediction: verbalizers, the loss at the mask, classification from a folder, recipes, joint tuning."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import build
from tokenizers_of import KINDS, tokenizer_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from hf_ptune import FreezeBackboneCallback, GuardCallback, PTuneConfig, get_ptune_model
from hf_ptune.backbone import TASKS
from hf_ptune.callbacks.guard import check_batch
from hf_ptune.cards import RunFacts
from hf_ptune.cloze import ClozeCollator, Verbalizer, Vocabulary, classify, predict_words
from hf_ptune.errors import ConfigError, GuardError, PTuneError, RecipeError, TemplateError
from hf_ptune.info import describe_adapter
from hf_ptune.optimizer import make_optimizer
from hf_ptune.recipe import make_recipe
from hf_ptune.templates import Template
from hf_ptune.train import run

TEXTS = {"MASKED_LM": "[P2] {first} [P2] it was [MASK] [P1] .", "CAUSAL_LM": "[P2] {first} [P3] it was [MASK]"}
VERBALIZER = {"no": ["bad", "no"], "yes": "great"}
ROWS = [{"first": "hello world"}, {"first": "a b c x y"}, {"first": "z"}]
MASKED, CAUSAL = ["bert", "roberta", "deberta-v2", "modernbert", "distilbert"], ["gpt2", "llama", "bloom"]
FAMILIES = [(f, "MASKED_LM") for f in MASKED] + [(f, "CAUSAL_LM") for f in CAUSAL]
every_family = pytest.mark.parametrize(("family", "task"), FAMILIES)


def make(family: str, task: str, side: str = "right", **options: Any) -> tuple[Any, Any]:
    """A model with a template and a verbalizer, and its tokenizer."""
    tokenizer = tokenizer_of("wordpiece", mask=task == "MASKED_LM")
    tokenizer.padding_side = side
    settings = {"template": TEXTS[task], "verbalizer": VERBALIZER, "encoder_reparameterization_type": "LSTM"} | options
    torch.manual_seed(4)
    model = get_ptune_model(build(family, task), PTuneConfig(method="p_tuning", **settings), tokenizer)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.normal_(0, 0.4)
    return model.eval(), tokenizer


def encode(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    template = Template.parse(model.config.template)
    return [template.encode(tokenizer, row, causal=model.task == "CAUSAL_LM").inputs for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_means_over_words_and_tokens(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    logits = torch.randn(3, len(tokenizer))
    words = {"bad": ["bad", "terrible"], "good": "great"}
    with pytest.raises(TemplateError, match=r"'terrible' of 'bad' is \d+ tokens \('"):
        Verbalizer(words, tokenizer, spaced=True)
    verbalizer = Verbalizer(words, tokenizer, spaced=True, average=True)
    before = tokenizer("it was", add_special_tokens=False)["input_ids"]
    ids = {
        w: tokenizer(f"it was {w}", add_special_tokens=False)["input_ids"][len(before) :]
        for w in ("bad", "terrible", "great")
    }
    expected = torch.stack(
        [(logits[:, ids["bad"]].mean(1) + logits[:, ids["terrible"]].mean(1)) / 2, logits[:, ids["great"]].mean(1)], 1
    )
    assert torch.allclose(verbalizer.scores(logits), expected, atol=1e-6)
    assert torch.equal(verbalizer.choose(logits[:, None], torch.zeros(3)), expected.argmax(1))


def test_verbalizers_that_do_not_fit() -> None:
    tokenizer = tokenizer_of("wordpiece")
    with pytest.raises(TemplateError, match="does not know the word 'été'"):
        Verbalizer({"a": "été", "b": "no"}, tokenizer, True)
    with pytest.raises(ConfigError, match="two labels have the words"):
        Verbalizer({"a": "no", "b": ["no"]}, tokenizer, True)
    with pytest.raises(ConfigError, match="no word for 'a'"):
        Verbalizer({"a": [], "b": "no"}, tokenizer, True)
    with pytest.raises(ConfigError, match="the labels are"):
        Verbalizer({"a": "no", "b": "yes"}, tokenizer, True, labels=["a", "c"])
    with pytest.raises(TemplateError, match="not one token"):
        Vocabulary(tokenizer, True).number("hello world")
    assert Verbalizer({"a": "no", "b": "yes"}, tokenizer, True, labels=["b", "a"]).labels == ["b", "a"]


@pytest.mark.parametrize(("family", "task"), [("bert", "MASKED_LM"), ("gpt2", "CAUSAL_LM")])
def test_rows_of_any_length_are_answered(family: str, task: str) -> None:
    model, tokenizer = make(family, task)
    room = model.backbone.config.max_position_embeddings
    long = [{"first": "hello " * (room + 9)}]
    assert classify(model, tokenizer, long) == classify(model, tokenizer, long, max_length=room)
    (choice,) = predict_words(model, tokenizer, long, top_k=10**6)
    assert choice.probabilities[choice.label] == max(choice.probabilities.values())  # though some are written alike
    with pytest.raises(TemplateError, match="a row is 'hello'; expected the template's fields"):
        classify(model, tokenizer, ["hello"])  # type: ignore[list-item]


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_that_of_full_logits_and_the_head_sees_one_position(family: str, task: str, side: str) -> None:
    if side == "left" and family in ("bert", "roberta", "deberta-v2", "distilbert"):
        pytest.skip("the base itself gives other logits under left padding: its positions start at the pads")
    model, tokenizer = make(family, task, side)
    if family == "bloom" and side == "left":
        model = model.float()  # in float64 its masked rows overflow in a float32 softmax, without a prompt too
    close = 1e-7 if model.dtype == torch.float64 else 1e-4
    batch = ClozeCollator(tokenizer, task == "CAUSAL_LM")([f | {"labels": 1} for f in encode(model, tokenizer)])
    labels = batch.pop("labels")
    verbalizer = Verbalizer(VERBALIZER, tokenizer, spaced=True)
    no = [tokenizer.convert_tokens_to_ids(w) for w in ("bad", "no", "great")]
    seen: list[Any] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    loss = verbalizer.loss(model(**batch), labels)
    assert seen[-1][:2] == (3, 1)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.prompt.named_parameters()}
    model.zero_grad()

    at = batch.pop("logits_at")
    whole = model(**batch).logits
    assert seen[-1][1] == batch["input_ids"].shape[1]
    handle.remove()
    read = torch.stack([whole[n, at[n]] for n in range(3)])
    for n in range(3):  # the mask itself, or the last token
        last = batch["attention_mask"][n].nonzero().max()
        assert at[n] == last if task == "CAUSAL_LM" else batch["input_ids"][n, at[n]] == tokenizer.mask_token_id
    scores = torch.stack([read[:, no[:2]].mean(1), read[:, no[2]]], 1)
    assert labels.shape == ((3, 2) if task == "CAUSAL_LM" else (3,))
    expected = F.cross_entropy(scores.float(), torch.tensor([1, 1, 1]))
    assert torch.allclose(loss, expected, atol=10 * close)
    expected.backward()
    for name, parameter in model.prompt.named_parameters():
        assert parameter.grad.abs().max() > 0 and torch.allclose(found[name], parameter.grad, atol=close), name


@every_family
def test_classification_from_a_folder(family: str, task: str, tmp_path: Path) -> None:
    base = build(family, task)
    base.save_pretrained(tmp_path / "base")
    tokenizer = tokenizer_of("wordpiece", mask=task == "MASKED_LM")
    tokenizer.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").double()
    config = PTuneConfig(method="p_tuning", template=TEXTS[task], verbalizer=VERBALIZER)
    model = get_ptune_model(base, config, tokenizer)
    before = classify(model, tokenizer, ROWS, batch_size=2)
    model.save_pretrained(tmp_path / "a", flatten=True)
    tokenizer.save_pretrained(tmp_path / "a")
    assert f"template: {TEXTS[task]}" in describe_adapter(str(tmp_path / "a"))
    loaded = TASKS[task].from_pretrained(tmp_path / "a")
    reader = AutoTokenizer.from_pretrained(tmp_path / "a")
    after = classify(loaded, reader, ROWS, batch_size=3)
    words = predict_words(loaded, reader, ROWS, top_k=99)
    for old, new, row, best in zip(before, after, ROWS, words, strict=True):
        assert old.label == new.label in VERBALIZER
        assert old.probabilities == pytest.approx(new.probabilities, abs=1e-5)
        # a row alone, through plain calls
        text = Template.parse(TEXTS[task]).render(row, reader, causal=task == "CAUSAL_LM")
        inputs = reader(text, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        at = len(ids) - 1 if task == "CAUSAL_LM" else ids.index(reader.mask_token_id)
        with torch.no_grad():
            logits = loaded(**inputs).logits[0, at]
        no, yes = (
            logits[reader.convert_tokens_to_ids(["bad", "no"])].mean(),
            logits[reader.convert_tokens_to_ids("great")],
        )
        assert new.probabilities["yes"] == pytest.approx(torch.sigmoid(yes - no).item(), abs=1e-5)
        assert best.label == reader.decode([int(logits.argmax())]).strip()
    if task == "MASKED_LM":
        filled = pipeline("fill-mask", model=loaded, tokenizer=reader)(
            Template.parse(TEXTS[task]).render(ROWS[0], reader), top_k=1
        )
        assert filled[0]["token_str"] == words[0].label
    with pytest.raises(ConfigError, match="no verbalizer"):
        loaded.config.verbalizer = None
        classify(loaded, reader, ROWS)


def test_words_that_follow_no_space_are_read_so_and_the_likeliest_of_those_written_alike_counts() -> None:
    tokenizer = tokenizer_of("metaspace")
    torch.manual_seed(4)
    config = PTuneConfig(method="p_tuning", template="[P2] {first},[MASK]", verbalizer={"no": "bad", "yes": "great"})
    model = get_ptune_model(build("bert", "MASKED_LM"), config, tokenizer).eval()
    found, words = (f(model, tokenizer, ROWS, **o)[0] for f, o in ((classify, {}), (predict_words, {"top_k": 99})))
    inputs = tokenizer(Template.parse(config.template).render(ROWS[0], tokenizer), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)]
    no, yes = logits[tokenizer.convert_tokens_to_ids(["bad", "great"])]  # without the sign of a space
    assert found.probabilities["yes"] == pytest.approx(torch.sigmoid(yes - no).item(), abs=1e-5)
    for word in ("bad", "great", "Paris"):
        pair = logits.softmax(-1)[tokenizer.convert_tokens_to_ids([word, f"▁{word}"])]
        assert words.probabilities[word] == pytest.approx(pair.max().item(), abs=1e-6) and pair[0] != pair[1]


def test_logits_at_asks_for_a_language_model_and_no_labels() -> None:
    model, tokenizer = make("bert", "MASKED_LM")
    batch = ClozeCollator(tokenizer, False)(encode(model, tokenizer))
    with pytest.raises(PTuneError, match="labels came with logits_at"):
        model(**batch, labels=batch["input_ids"])
    other = get_ptune_model(build("bert", "SEQ_CLS"), PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2))
    with pytest.raises(PTuneError, match="is for CAUSAL_LM and MASKED_LM"):
        other(input_ids=batch["input_ids"] % 30, logits_at=batch["logits_at"])


def test_guard_takes_the_trainer_s_loss() -> None:
    model, tokenizer = make("gpt2", "CAUSAL_LM")
    features = [f | {"labels": n % 2} for n, f in enumerate(encode(model, tokenizer))]
    batch = ClozeCollator(tokenizer, True)(features)
    verbalizer = Verbalizer(VERBALIZER, tokenizer, True)
    check_batch(model, batch, verbalizer.loss)
    with pytest.raises(GuardError, match="loss is nan"):
        check_batch(model, batch, lambda outputs, labels: outputs.logits.sum() * float("nan"))
    with pytest.raises(PTuneError, match="labels came with logits_at"):
        check_batch(model, batch)


def joint(family: str = "bert", task: str = "MASKED_LM") -> tuple[Any, Any]:
    model, tokenizer = make(family, task, train_backbone=True)
    return model, tokenizer


def test_backbone_is_part_of_the_adapter_when_it_trains() -> None:
    model, _ = joint()
    assert all(p.requires_grad for p in model.parameters())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == total and model.adapter_parameter_names() == {n for n, _ in model.named_parameters()}
    frozen, _ = make("bert", "MASKED_LM")
    assert {n.split(".")[0] for n in frozen.adapter_parameter_names()} == {"prompt"}


@pytest.mark.parametrize(("family", "task"), [("bert", "MASKED_LM"), ("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM")])
def test_joint_training_and_reload(family: str, task: str, tmp_path: Path) -> None:
    build(family, task).float().save_pretrained(tmp_path / "base")
    base = TASKS[task].from_pretrained(tmp_path / "base")
    tokenizer = tokenizer_of("wordpiece", mask=task == "MASKED_LM")
    config = PTuneConfig(method="p_tuning", template=TEXTS[task], verbalizer=VERBALIZER, train_backbone=True)
    model = get_ptune_model(base, config, tokenizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "out"), optim="sgd", learning_rate=0.5, max_steps=1, lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to="none", save_strategy="no", use_cpu=True, per_device_train_batch_size=3,
        weight_decay=0.0,
    )  # fmt: skip
    verbalizer = Verbalizer(VERBALIZER, tokenizer, True)
    features = [f | {"labels": n % 2} for n, f in enumerate(encode(model, tokenizer))]
    trainer = Trainer(
        model, arguments, train_dataset=features, data_collator=ClozeCollator(tokenizer, task == "CAUSAL_LM"),
        compute_loss_func=verbalizer.loss, optimizer_cls_and_kwargs=make_optimizer(arguments, model, 0.01),
        callbacks=[FreezeBackboneCallback(), GuardCallback(verbalizer.loss)],
    )  # fmt: skip
    twin = copy.deepcopy({"state": {n: t.clone() for n, t in model.state_dict().items()}})
    model.train()
    batch = ClozeCollator(tokenizer, task == "CAUSAL_LM")(features)
    labels = batch.pop("labels")
    verbalizer.loss(model(**batch), labels).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(twin["state"])
    trainer.train()
    for name, parameter in model.named_parameters():
        rate = 0.01 if name.startswith("backbone.") else 0.5
        if name in gradients:
            assert torch.allclose(parameter, before[name] - rate * gradients[name], atol=1e-5), name
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any(n.startswith("backbone.") for n in moved) and any(n.startswith("prompt.") for n in moved)
    model.eval()
    expected = classify(model, tokenizer, ROWS)
    model.save_pretrained(tmp_path / "a")
    loaded = TASKS[task].from_pretrained(tmp_path / "a")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert classify(loaded, tokenizer, ROWS) == expected


def test_rates_by_group_keep_heads_and_weight_decay_apart(tmp_path: Path) -> None:
    backbone = build("bert", "SEQ_CLS")
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2, train_backbone=True)
    model = get_ptune_model(backbone, config)
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.5, weight_decay=0.1, use_cpu=True, report_to="none")
    made = make_optimizer(arguments, model, 0.01)
    assert made is not None
    groups = {n: g for g in made[1]["params"] for p in g["params"] for n, q in model.named_parameters() if q is p}
    assert set(groups) == model.adapter_parameter_names()
    assert (groups["backbone.classifier.weight"]["lr"], groups["prompt.weight"]["lr"]) == (0.5, 0.5)
    query = "backbone.bert.encoder.layer.0.attention.self.query"
    assert (groups[f"{query}.weight"]["lr"], groups[f"{query}.weight"]["weight_decay"]) == (0.01, 0.1)
    assert groups[f"{query}.bias"]["weight_decay"] == 0.0
    assert make_optimizer(arguments, model, None) is None
    for name, rate in (("backbone_learning_rate", 0.0), ("head_learning_rate", -0.5)):
        with pytest.raises(ConfigError, match=f"{name}={rate}; expected more than 0"):
            make_optimizer(arguments, model, **{name: rate})
    frozen = get_ptune_model(build("bert", "SEQ_CLS"), PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="train_backbone=True"):
        make_optimizer(arguments, frozen, 0.01)


def test_a_kept_prompt_goes_when_the_backbone_has_moved() -> None:
    model = get_ptune_model(
        build("gpt2", "CAUSAL_LM"), PTuneConfig(method="prompt_tuning", num_virtual_tokens=3, train_backbone=True)
    ).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model(input_ids=ids)  # keeps keys and values of the prompt
        for block in model.backbone.transformer.h:
            block.attn.c_attn.weight.mul_(1.5)
        moved = model(input_ids=ids).logits
        model._injector.cached = None
        assert torch.equal(model(input_ids=ids).logits, moved)


def write_recipe(folder: Path, task: str, **changes: Any) -> dict[str, Any]:
    family = "gpt2" if task == "CLOZE_CAUSAL_LM" else "bert"
    model_task = task.removeprefix("CLOZE_")
    build(family, model_task).float().save_pretrained(folder / "base")
    tokenizer_of("wordpiece", mask=model_task == "MASKED_LM").save_pretrained(folder / "base")
    letters = ["a", "b", "c", "x", "y", "z"]
    rows = [
        {"first": f"{letters[n % 6]} {letters[(n // 2) % 6]}", "label": "yes" if n % 6 < 3 else "no",
         "answer": ["Paris", "Rome"][n % 6 < 3], "kind": "one" if n < 40 else "two"}
        for n in range(48)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content: dict[str, Any] = {
        "base": str(folder / "base"),
        "task": task,
        "method": "p_tuning",
        "task_options": {"template": TEXTS[model_task], "verbalizer": VERBALIZER},
        "data": {"source": "rows.jsonl", "where": {"kind": "one"}},
        "training": {
            "num_train_epochs": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
        },
        "output_dir": str(folder / "out"),
    }
    return content | changes


@pytest.mark.parametrize("task", ["CLOZE_MASKED_LM", "CLOZE_CAUSAL_LM"])
@pytest.mark.parametrize("way", ["verbalizer", "vocabulary", "joint"])
def test_recipe_to_answers(task: str, way: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if way == "vocabulary":
        changes["task_options"] = {"template": TEXTS[task.removeprefix("CLOZE_")]}
        changes["options"] = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 64}
    if way == "joint":
        changes = {"options": {"train_backbone": True}, "backbone_learning_rate": 1e-3}
    outcome = run(make_recipe(write_recipe(tmp_path, task, **changes), folder=tmp_path))
    metric = "p_at_1" if way == "vocabulary" else "accuracy"
    assert outcome.after[metric] > 0.6 and outcome.after["loss"] < outcome.before["loss"]
    assert (way == "vocabulary") != ("f1_macro" in outcome.after)
    config = PTuneConfig.from_pretrained(outcome.folder)
    assert config.template == TEXTS[task.removeprefix("CLOZE_")] and config.num_virtual_tokens == 5
    assert config.virtual_token_ids == AutoTokenizer.from_pretrained(outcome.folder).convert_tokens_to_ids(
        [f"<|prompt_{n}|>" for n in range(5)]
    )
    auto: Any = AutoModelForMaskedLM if "MASKED" in task else AutoModelForCausalLM
    assert auto.from_pretrained(outcome.folder).config.verbalizer == (
        None if way == "vocabulary" else {"no": ["bad", "no"], "yes": ["great"]}
    )
    assert outcome.answers and all(a.answer for a in outcome.answers)


def test_a_template_of_words_with_a_prefix(tmp_path: Path) -> None:
    content = write_recipe(tmp_path, "CLOZE_MASKED_LM", method="p_tuning_v2", options={"num_virtual_tokens": 4})
    content["task_options"] = content["task_options"] | {"template": "{first} it was [MASK] ."}
    outcome = run(make_recipe(content, folder=tmp_path))
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_options": {}}, "needs some part"),
        ({"task_options": {"template": "[P2] {first}"}}, "with .MASK. and at least one"),
        ({"task_options": {"template": "{first} [MASK"}}, "is no part of a template"),
        ({"task_options": {"template": "{first} [MASK] {answer}"}}, "which is to be told"),
        ({"task_options": {"template": "{first} [MASK]", "verbalizer": {"a": True, "b": "x"}}}, "YAML takes yes, no"),
        ({"task_options": {"template": "{first} [MASK]", "average_tokens": True}}, "average_tokens .* verbalizer"),
        (
            {"task_options": {"template": "{first} [MASK]", "verbalizer": VERBALIZER, "drop_long_answers": True}},
            "drop_long_answers .* verbalizer",
        ),
        ({"options": {"template": "{first} [MASK]"}}, "options.template"),
        ({"backbone_learning_rate": 1e-3}, "options.train_backbone: true"),
        ({"data": {"source": "rows.jsonl", "where": {"kind": "three"}}}, "no row has"),
        ({"data": {"source": "rows.jsonl", "columns": {"text": "first"}}}, "CLOZE_MASKED_LM has first, label"),
        ({"task_options": {"template": "{kind} [MASK]", "verbalizer": {"yes": "yes", "maybe": "maybe"}}}, "'no'"),
    ],
)
def test_recipes_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        run(make_recipe(write_recipe(tmp_path, "CLOZE_MASKED_LM", **changes), folder=tmp_path))


def test_answers_of_several_tokens_are_refused_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = write_recipe(tmp_path, "CLOZE_MASKED_LM", task_options={"template": TEXTS["MASKED_LM"]})
    content["training"] = content["training"] | {"max_steps": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + "\n" + json.dumps({"first": "a", "answer": "terrible", "kind": "one"}))
    with pytest.raises(RecipeError, match=r"not one token.*drop_long_answers"):
        run(make_recipe(content, folder=tmp_path))
    content["task_options"] = content["task_options"] | {"drop_long_answers": True}
    outcome = run(make_recipe(content, folder=tmp_path))
    assert "30 rows to train on, 10 held out" in capsys.readouterr().out  # of 31
    assert RunFacts.load(outcome.folder).hyperparameters["training_rows"] == 30
