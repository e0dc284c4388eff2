"""Virtual tokens anywhere in a sequence, against inputs_embeds put together by hand."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from torch import Tensor
from transformers import AlbertConfig, GenerationConfig, MambaConfig, PreTrainedModel

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.backbone import TASKS
from hf_ptune.callbacks.guard import check_batch
from hf_ptune.errors import BackboneError, ConfigError, GuardError, InjectionError
from hf_ptune.injection.placeholders import Placeholders
from hf_ptune.interop import prompt_embeds, save_peft

TEMPLATE = "[P2] {text} [P1] was [MASK]"
VIRTUAL = [VOCABULARY + 4, VOCABULARY, VOCABULARY + 9]  # no such rows in the matrix, and in no order
A, B, C = VIRTUAL
IDS = torch.tensor([[A, B, 11, 12, C, 13, 14], [21, A, B, 22, 23, 24, C]])
MASKED = ["bert", "roberta", "albert", "deberta-v2", "modernbert"]
CAUSAL = ["gpt2", "llama", "bloom"]
TASK = dict.fromkeys(MASKED, "MASKED_LM") | dict.fromkeys(CAUSAL, "CAUSAL_LM") | {"t5": "SEQ_2_SEQ_LM"}
families = pytest.mark.parametrize("family", list(TASK))
_ALBERT = AlbertConfig(
    vocab_size=VOCABULARY,
    embedding_size=16,  # narrower than the layers
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=64,
    pad_token_id=0,
    initializer_range=0.3,
)


def make_base(family: str) -> PreTrainedModel:
    if family != "albert":
        return build(family, TASK[family])
    torch.manual_seed(0)
    base: PreTrainedModel = TASKS["MASKED_LM"].from_config(_ALBERT)
    return base.double().eval()


def config_of(method: str = "p_tuning", **options: Any) -> PTuneConfig:
    return PTuneConfig(method=method, template=TEMPLATE, virtual_token_ids=VIRTUAL, **options)


def wrapped(family: str, **options: Any) -> Any:
    torch.manual_seed(3)
    model = get_ptune_model(make_base(family), config_of(**options))
    assert model.prompt is not None
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def by_hand(base: PreTrainedModel, ids: Tensor, prompt: Tensor) -> Tensor:
    """Embeddings `[B, S, H]`, one position after the other."""
    words = base.get_input_embeddings()
    rows = [
        torch.stack([prompt[VIRTUAL.index(i)] if i in VIRTUAL else words(torch.tensor([i]))[0] for i in row])
        for row in ids.tolist()
    ]
    return torch.stack(rows)


def labels_for(family: str) -> Tensor:
    if family == "t5":
        return torch.tensor([[5, 6, 7], [8, 9, 1]])
    return torch.where(IDS >= VOCABULARY, -100, (IDS * 3) % VOCABULARY)


@families
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients_equal_embeddings_put_together_by_hand(family: str, padded: bool) -> None:
    model, base = wrapped(family), make_base(family)
    base.requires_grad_(False)
    ids, mask, labels = IDS, torch.ones_like(IDS), labels_for(family)
    extra: dict[str, Any] = {}
    if padded:
        ids = torch.nn.functional.pad(ids, (0, 2), value=0)
        mask = torch.nn.functional.pad(mask, (0, 2))
        if family != "t5":
            labels = torch.nn.functional.pad(labels, (0, 2), value=-100)
        if family == "roberta":  # with inputs_embeds it takes pads for tokens
            extra["position_ids"] = torch.tensor([[n + 1 if n < 7 else 0 for n in range(9)]] * 2)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    twin = copy.deepcopy(model.prompt)
    expected = base(inputs_embeds=by_hand(base, ids, twin()), attention_mask=mask, labels=labels, **extra)
    assert output.logits.shape == expected.logits.shape and output.logits.shape[-1] == VOCABULARY
    kept = mask.bool() if family != "t5" else slice(None)
    assert torch.allclose(output.logits[kept], expected.logits[kept], atol=1e-12)
    assert torch.allclose(output.loss, expected.loss, atol=1e-12)
    output.loss.backward()
    expected.loss.backward()
    for name, parameter in twin.named_parameters():
        found = model.prompt.get_parameter(name).grad
        assert parameter.grad.abs().max() > 0 and torch.allclose(found, parameter.grad, atol=1e-12), name
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("family", [f for f in TASK if f != "albert"])  # which has none
@pytest.mark.parametrize("reentrant", [False, True])
def test_training_and_checkpointing(family: str, reentrant: bool) -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels_for(family)}
    gradients = []
    for checkpointing in (False, True):
        model = wrapped(family, method="prompt_tuning").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).loss.backward()
        gradients.append(model.prompt.weight.grad)
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, atol=1e-10)


@families
def test_prompt_is_encoded_once_a_call_and_kept_in_eval(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = wrapped(family, encoder_reparameterization_type="LSTM"), []
    forward = type(model.prompt).forward
    monkeypatch.setattr(type(model.prompt), "forward", lambda self: (calls.append(1), forward(self))[1])
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels_for(family)}
    model.train()(**inputs).loss.backward()  # the first one also tries what a language model's loss may leave out
    calls.clear()
    model(**inputs).loss.backward()
    assert len(calls) == 1
    with torch.no_grad():
        first = model.eval()(**inputs).loss
        assert len(calls) == 2 and torch.equal(model(**inputs).loss, first) and len(calls) == 2
        model.prompt.embedding.weight.mul_(2)
        assert not torch.equal(model(**inputs).loss, first)


@families
def test_save_and_load(family: str, tmp_path: Path) -> None:
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").double()
    model = get_ptune_model(base, config_of()).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels_for(family)}
    with torch.no_grad():
        before = model(**inputs).logits
        for flatten in (False, True):
            model.save_pretrained(tmp_path / "a", flatten=flatten)
            loaded = TASKS[TASK[family]].from_pretrained(tmp_path / "a")
            assert isinstance(loaded, PTunePreTrainedModel) and loaded.config.virtual_token_ids == VIRTUAL
            assert torch.allclose(loaded(**inputs).logits, before, atol=1e-12)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generate_equals_step_by_step(family: str, settings: dict[str, Any]) -> None:
    model = wrapped(family)
    pads = {"bloom": "right", "gpt2": "left", "llama": "left"}[family]
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1, :5]], 1) if pads == "left" else IDS[:1]
    mask = (ids != 0).long()
    beams = settings.get("num_beams", 1)
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **settings)
    assert torch.equal(written[:, : ids.shape[1]], ids) and written.shape[1] == ids.shape[1] + 4
    if beams == 1:
        for _ in range(4):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            extra = {} if family == "bloom" else {"position_ids": positions}
            with torch.no_grad():
                best = model(input_ids=ids, attention_mask=mask, **extra).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
        assert torch.equal(written, ids)


@pytest.mark.parametrize("family", MASKED + CAUSAL)
def test_batch_make_up_changes_nothing(family: str) -> None:
    model = wrapped(family)
    with torch.no_grad():
        both = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        for number in range(2):
            alone = model(input_ids=IDS[number : number + 1]).logits
            assert torch.allclose(alone[0], both[number], atol=1e-10)


def test_only_the_prompt_is_trained_and_counted() -> None:
    model = wrapped("bert")
    assert model.adapter_parameter_names() == {f"prompt.{n}" for n, _ in model.prompt.named_parameters()}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.prompt.parameters())


def test_prompt_turned_off_or_taken_off() -> None:
    base, model = make_base("bert"), wrapped("bert")
    places: Placeholders = model._injector.placeholders
    plain = IDS.masked_fill(torch.isin(IDS, torch.tensor(VIRTUAL)), places.plain)
    with torch.no_grad():
        expected = base(input_ids=plain).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, expected)
        backbone = model.unwrap()
        assert torch.equal(backbone(input_ids=plain).logits, expected)
        with pytest.raises(IndexError):
            backbone(input_ids=IDS)


def test_heads_on_top_of_placed_tokens() -> None:
    base = build("gpt2", "SEQ_CLS")
    model = get_ptune_model(copy.deepcopy(base), config_of()).eval()
    pads = torch.nn.functional.pad(IDS, (0, 2), value=0)
    found = model(input_ids=pads, attention_mask=(pads != 0).long()).logits
    expected = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.allclose(found, expected, atol=1e-10)
    assert {n for n in model.adapter_parameter_names() if n.startswith("backbone.")} == {"backbone.score.weight"}


def test_bases_without_attention_take_placed_tokens() -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCABULARY}
    base = TASKS["CAUSAL_LM"].from_config(MambaConfig(**settings, pad_token_id=0)).double().eval()
    model = get_ptune_model(copy.deepcopy(base), config_of(method="prompt_tuning")).eval()
    found = model(input_ids=IDS, labels=labels_for("gpt2"))
    expected = base(inputs_embeds=by_hand(base, IDS, model.prompt()))
    assert torch.allclose(found.logits, expected.logits, atol=1e-10)
    found.loss.backward()
    assert model.prompt.weight.grad.abs().min(1).values.max() > 0


def test_refusals(tmp_path: Path) -> None:
    model = wrapped("gpt2")
    embeds = model.get_input_embeddings()(IDS % VOCABULARY)
    with pytest.raises(InjectionError, match="without input_ids"):
        model(inputs_embeds=embeds)
    with model.disable_adapter():
        model(inputs_embeds=embeds)
    with pytest.raises(InjectionError, match="repetition_penalty=1.5"):
        model.generate(input_ids=IDS, repetition_penalty=1.5, max_new_tokens=2)
    settings = GenerationConfig(repetition_penalty=1.5, max_new_tokens=2)
    for call in (lambda: model.generate(IDS, settings), lambda: model.generate(IDS, generation_config=settings)):
        with pytest.raises(InjectionError, match="repetition_penalty=1.5"):
            call()
    with pytest.raises(ConfigError, match="before the text"):
        save_peft(model, tmp_path / "peft")
    with pytest.raises(ConfigError, match="among the tokens"):
        prompt_embeds(model)
    labels = IDS % VOCABULARY
    with pytest.raises(GuardError, match="2 of 2 rows of the first batch lack virtual tokens"):
        check_batch(model, {"input_ids": IDS % VOCABULARY, "attention_mask": torch.ones_like(IDS), "labels": labels})
    check_batch(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels})


def test_words_that_are_embedded_eagerly_in_a_compiled_model() -> None:
    model = wrapped("gpt2")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        words = model.get_input_embeddings()
        words._compiled_call_impl = torch._dynamo.disable(words._call_impl)
        assert torch.allclose(torch.compile(model, backend="eager")(input_ids=IDS).logits, expected, atol=1e-9)
    torch._dynamo.reset()


def test_generation_that_reads_virtual_tokens_elsewhere_is_refused() -> None:
    model = wrapped("gpt2")
    with pytest.raises(InjectionError, match="assistant_model"):
        model.generate(IDS[:1], assistant_model=build("gpt2"), max_new_tokens=2)
    with pytest.raises(InjectionError, match="encoder_repetition_penalty"):
        wrapped("t5").generate(IDS, encoder_repetition_penalty=1.3, max_new_tokens=2)
    with pytest.raises(InjectionError, match="paged caches"):
        model.generate(IDS, cache_implementation="paged", max_new_tokens=2)


def test_family_that_reads_ids_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("gpt2", "CAUSAL_LM")
    forward = base.transformer.wte.forward
    # another embedding of a sequence than the one it was given
    base.transformer.wte.forward = lambda ids: forward(ids.flip(1))
    with pytest.raises(BackboneError, match="cannot place virtual tokens"):
        get_ptune_model(base, config_of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "p_tuning_v2"}, "has none among the inputs"),
        ({"num_virtual_tokens": 5}, "has 3 virtual tokens, but num_virtual_tokens=5"),
        ({"position_shift": True}, "counted as tokens are"),
        ({"virtual_token_ids": [4, 4, 5]}, "3 different ids"),
        ({"template": "{text} it was [MASK]"}, "for a template that places virtual tokens"),
        ({"template": "[P3 {text}"}, "is no part of a template"),
        ({"verbalizer": {"a": "good"}}, "two labels or more"),
        ({"verbalizer": {"a": "good", "b": []}}, "two labels or more"),
        ({"template": "[P3] {text}", "verbalizer": {"a": "good", "b": "bad"}}, "needs a template with"),
    ],
)
def test_configurations_that_describe_nothing(options: dict[str, Any], message: str) -> None:
    settings = {"method": "p_tuning", "template": TEMPLATE, "virtual_token_ids": VIRTUAL}
    with pytest.raises(ConfigError, match=message):
        PTuneConfig(**(settings | options))


def test_template_of_words_goes_with_every_method() -> None:
    for method in ("p_tuning_v2", "prompt_tuning", "bitfit"):
        config = PTuneConfig(method=method, template="{text} it was [MASK]", num_virtual_tokens=4)
        model = get_ptune_model(build("bert", "MASKED_LM"), config)
        assert model.config.virtual_token_ids is None and model(input_ids=IDS % VOCABULARY).logits.shape[1] == 7


def test_ids_are_needed() -> None:
    config = PTuneConfig(method="p_tuning", template=TEMPLATE)
    make: Callable[..., Any] = get_ptune_model
    with pytest.raises(ConfigError, match="tokenizer"):
        make(build("bert", "MASKED_LM"), config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_virtual_tokens_are_no_words_to_be_told(family: str) -> None:
    model = wrapped(family)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert torch.allclose(loss, model(input_ids=IDS, labels=IDS.where(IDS < VOCABULARY, torch.tensor(-100))).loss)
