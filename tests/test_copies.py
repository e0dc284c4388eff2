"""A wrapper's life beside training: copies, pickles, threads, inference mode, other embeddings and other weights."""

import copy
import gc
import logging
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, build
from torch import Tensor
from transformers import StaticCache

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import PTuneError
from hf_ptune.methods import Method, registry

Wrap = Callable[..., PTunePreTrainedModel]
KINDS = [
    ("llama", "prompt_tuning"),
    ("llama", "p_tuning_v2"),
    ("bert", "p_tuning"),
    ("bert", "prefix_tuning"),
    ("gpt2", "bitfit"),
    ("t5", "prompt_tuning"),
    ("t5", "p_tuning_v2"),
]


def step(model: PTunePreTrainedModel, family: str) -> None:
    model.train()
    model(**batch(family)).loss.backward()
    model.eval()


def change(model: PTunePreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_parameter_names():
                parameter.add_(0.5)


@pytest.mark.parametrize(("family", "method"), KINDS)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_answers_alike_and_has_a_life_of_its_own(family: str, method: str, make: Any, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), batch(family)
    step(model, family)
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = make(model)
        assert type(twin) is type(model) and torch.allclose(twin(**inputs).logits, expected, atol=1e-10)
        change(twin)
        assert not torch.allclose(twin(**inputs).logits, expected, atol=1e-3)
        again = get_ptune_model(twin.backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2))
        again(**inputs)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-10)
    step(model, family)


@pytest.mark.parametrize(("family", "method"), KINDS)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_written_in_place_behind_an_answer_leave_a_model_that_can_be_copied(
    family: str, method: str, make: Any, mode: Any, wrap: Wrap
) -> None:
    model, inputs = wrap(family, method), batch(family)
    with mode():
        model(**inputs)
    for tensor in model.state_dict().values():  # an average of weights, with gradients on
        if tensor.is_floating_point():
            tensor.mul_(0.9)
    twin = make(model)
    with torch.no_grad():
        assert torch.allclose(twin(**inputs).logits, model(**inputs).logits, atol=1e-10)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_pickle_does_not_tell_whether_a_model_has_answered(method: str, wrap: Wrap) -> None:
    model = wrap("llama", method)
    before = pickle.dumps(model)
    with torch.no_grad():
        model(**batch("llama"))
    assert pickle.dumps(model) == before


@pytest.mark.parametrize(("family", "method"), [k for k in KINDS if k[1] != "bitfit"])
def test_inference_mode_answers_alike_and_leaves_nothing_that_training_meets(
    family: str, method: str, wrap: Wrap
) -> None:
    model, inputs = wrap(family, method), dict(batch(family))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -2:] = 0
    with torch.inference_mode():
        found = model(**inputs).logits
        with_own_mask = model(**inputs | {"attention_mask": inputs["attention_mask"].clone()}).logits
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-9) and torch.allclose(with_own_mask, expected, atol=1e-9)
    step(model, family)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_the_first_calls_may_come_from_several_threads(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method), batch("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(model(**inputs).logits)

    for _ in range(5):
        model.eval()  # the prompt is made anew
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 20 and all(torch.allclose(f, expected, atol=1e-9) for f in found)


def test_a_base_has_its_biases_of_before_again() -> None:
    base, inputs = build("gpt2"), batch("gpt2")
    with torch.no_grad():
        expected = base(**inputs).logits
        model = get_ptune_model(base, PTuneConfig(method="bitfit"))
        change(model)
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
        assert torch.equal(model.unwrap()(**inputs).logits, expected)
        change(get_ptune_model(base, PTuneConfig(method="bitfit")))
        again = get_ptune_model(base, PTuneConfig(num_virtual_tokens=2))
        assert torch.equal(again.unwrap()(**inputs).logits, expected)


def test_a_method_of_anybody_says_what_of_the_base_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = {n for n, _ in build("llama").named_parameters() if "norm" in n}
    method = Method("norms", "Norms", "nobody", None, None, of_base=lambda base: norms)
    monkeypatch.setitem(registry._METHODS.things, "norms", method)
    base, inputs = build("llama"), batch("llama")
    with torch.no_grad():
        expected = base(**inputs).logits
        model = get_ptune_model(base, PTuneConfig(method="norms"))
        assert norms and model.adapter_parameter_names() == {f"backbone.{n}" for n in norms}
        change(model)
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
        assert torch.equal(model.unwrap()(**inputs).logits, expected)


def test_a_base_that_an_adapter_has_changed_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("hf_ptune.wrapping"), "propagate", True)
    base = build("gpt2")
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=2, modules_to_save=["ln_f"])).unwrap()
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=2))
    assert "ln_f" in caplog.text and "trained by an earlier adapter" in caplog.text


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Let threads take turns so often that what they share is seen."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("method", "template"), [("prompt_tuning", None), ("prompt_tuning", "[P2] {text} [P2]"), ("prefix_tuning", None)]
)
def test_threads_with_rows_of_their_own_do_not_disturb_each_other(
    method: str, template: str | None, gradients: bool
) -> None:
    """With logits at one position, without, and with virtual tokens at unlike places."""
    placed = {} if template is None else {"template": template, "virtual_token_ids": [120, 121, 122, 123]}
    model = get_ptune_model(build("gpt2"), PTuneConfig(method=method, num_virtual_tokens=4, **placed)).eval()
    calls: list[dict[str, Tensor]] = []
    for number in range(3):
        ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(number))
        if template is not None:
            ids[:, number : number + 4] = torch.arange(120, 124)
        calls.append({"input_ids": ids} | ({"logits_at": torch.full((2,), 2 + number)} if number else {}))
    with torch.no_grad():
        alone = [model(**call).logits for call in calls]
    wrong: list[Any] = []

    def run(call: dict[str, Tensor], expected: Tensor) -> None:
        for _ in range(100):
            try:
                with torch.set_grad_enabled(gradients):
                    found = model(**call).logits
                if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-12):
                    wrong.append(call)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=args) for args in zip(calls, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_mask_of_inference_mode_may_be_changed_in_place(wrap: Wrap) -> None:
    model, ids = wrap("llama", "p_tuning_v2"), batch("llama")["input_ids"]
    with torch.inference_mode():
        mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
        before = model(input_ids=ids, attention_mask=mask).logits
        mask[..., 1:, 0] = False
        found = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, model(input_ids=ids, attention_mask=mask.clone()).logits)
        assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_prompt_is_encoded_once_for_all_batches_of_an_evaluation(family: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning", encoder_hidden_size=8), batch(family)
    runs: list[int] = []
    model.prompt.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
    assert len(runs) == 1
    step(model, family)
    runs.clear()
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("family", "method"),
    [(f, m) for f in ("llama", "bert", "bloom", "t5") for m in ("prompt_tuning", "p_tuning", "prefix_tuning")],
)
def test_a_mean_teacher_written_through_data_answers_with_its_prompt_of_now(
    family: str, method: str, wrap: Wrap
) -> None:
    student, inputs = wrap(family, method), batch(family)
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.5)
    answers = []
    for _ in range(3):
        student.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for averaged, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            averaged.data.mul_(0.5).add_(parameter.data, alpha=0.5)
        with torch.no_grad():
            answers.append(teacher(**inputs).logits)
            assert torch.allclose(answers[-1], copy.deepcopy(teacher).eval()(**inputs).logits, atol=1e-12)
    assert not torch.allclose(answers[0], answers[-1], atol=1e-6)


@pytest.mark.parametrize(("family", "method"), [*KINDS, ("bart", "prompt_tuning")])
def test_resized_embeddings_change_no_answer_and_go_on_training(family: str, method: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), batch(family)
    step(model, family)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.resize_token_embeddings(120)
        found = model(**inputs).logits
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-8)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    step(model, family)
    names = model.adapter_parameter_names()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in names)


def test_other_positions_of_the_base_are_refused(wrap: Wrap) -> None:
    """They would be no part of the adapter's folder, whose base has as many as before."""
    model = wrap("distilbert", "p_tuning_v2")
    assert model.get_position_embeddings() is model.backbone.get_position_embeddings()
    model.resize_position_embeddings(64)
    with pytest.raises(PTuneError, match="has 64 positions.*Resize them in the base, save it"):
        model.resize_position_embeddings(128)
    assert model.get_position_embeddings().weight.shape[0] == 64
    with pytest.raises(NotImplementedError, match="Bert"):
        wrap("bert", "p_tuning_v2").resize_position_embeddings(128)


@pytest.mark.parametrize("family", ["t5", "bart", "bert", "llama"])
def test_a_base_s_own_inputs_to_try_it_with(family: str, wrap: Wrap) -> None:
    model = wrap(family, "p_tuning_v2")
    inputs = {name: t % 9 if t.dtype == torch.long else t for name, t in model.dummy_inputs.items()}
    assert inputs.keys() == model.backbone.dummy_inputs.keys() and model(**inputs).logits is not None


def test_a_template_prompt_outlives_resized_embeddings(wrap: Wrap) -> None:
    options = {"template": "[P4] {text}", "virtual_token_ids": [95, 96, 97, 98]}
    model = wrap("t5", "prompt_tuning", **options)
    inputs = dict(batch("t5"))
    inputs["input_ids"] = torch.cat([torch.tensor([[95, 96, 97, 98]] * 2), inputs["input_ids"][:2]], 1)
    inputs = {"input_ids": inputs["input_ids"], "labels": inputs["labels"][:2]}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.resize_token_embeddings(120)
        assert torch.allclose(model(**inputs).logits[..., : expected.shape[-1]], expected, atol=1e-8)


def test_other_embeddings_are_those_that_are_read(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "prompt_tuning"), batch("bert")
    table = torch.nn.Embedding.from_pretrained(torch.randn_like(model.get_input_embeddings().weight))
    words = table(inputs["input_ids"])
    with torch.no_grad():
        expected = model(inputs_embeds=words, attention_mask=inputs["attention_mask"]).logits
        model.set_input_embeddings(table)
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_other_weights_of_the_base_make_the_shared_prompt_anew(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method), batch("llama")
    with torch.no_grad():
        before = model(**inputs).logits
        model.backbone.load_state_dict({n: t * 1.1 for n, t in model.backbone.state_dict().items()})
        found = model(**inputs).logits
        model.eval()
        assert torch.allclose(found, model(**inputs).logits, atol=1e-10)
        assert not torch.allclose(found, before, atol=1e-3)


def test_blocks_that_turn_the_adapter_off_nest(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2"), batch("bert")
    with torch.no_grad(), model.disable_adapter():
        expected = model(**inputs).logits
        with model.disable_adapter():
            pass
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-10)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)


def test_a_block_that_turns_the_adapter_off_may_attach_it_anew(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2"), batch("llama")
    expected = model(**inputs).logits
    with model.disable_adapter():
        model.resize_token_embeddings(model.config.vocab_size + 8)
        assert not torch.allclose(model(**inputs).logits[..., : expected.shape[-1]], expected, atol=1e-3)
    assert torch.allclose(model(**inputs).logits[..., : expected.shape[-1]], expected, atol=1e-9)


def test_a_flattened_prompt_is_the_one_that_answers(wrap: Wrap) -> None:
    """Also where it is written in place, loaded, or flattened while it trained; nothing of its network stays."""
    model, inputs = wrap("llama", "p_tuning"), batch("llama")
    network, size = weakref.ref(model.prompt), len(pickle.dumps(model))
    expected = model(**inputs).logits
    model.train().flatten().eval()
    gc.collect()
    assert network() is None and len(pickle.dumps(model)) < size
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)
    encode, made = model._injector.encode, []
    model._injector.encode = lambda: made.append(1) or encode()
    with torch.no_grad():
        first = [model(**inputs).logits for _ in range(3)]
        assert len(made) == 1 and torch.allclose(first[2], expected, atol=1e-9)
        model.prompt.weight.mul_(3)
        second = model(**inputs).logits
        model.prompt.load_state_dict({"weight": model.prompt.weight / 3})
        assert not torch.allclose(second, expected, atol=1e-3)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)


@pytest.mark.usefixtures("quick_switches")
def test_a_copy_has_no_part_in_passes_that_run_beside_it(wrap: Wrap) -> None:
    model, inputs, copies = wrap("llama", "prompt_tuning"), batch("llama"), []
    with torch.no_grad():
        expected = model(**inputs).logits
    thread = threading.Thread(target=lambda: copies.extend(copy.deepcopy(model) for _ in range(20)))
    thread.start()
    while thread.is_alive():
        model(**inputs)  # with gradients, so that the prompt runs each time
    with torch.no_grad():
        assert all(torch.allclose(one(**inputs).logits, expected, atol=1e-9) for one in copies)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_threads_may_train_rows_of_their_own(method: str, wrap: Wrap) -> None:
    model, found, right = wrap("llama", method).train(), {}, {}
    calls = {size: {k: v[:, :size] for k, v in batch("llama").items()} for size in (4, 5, 6)}
    for size, call in calls.items():
        model.zero_grad()
        right[size] = model(**call).loss.item()

    def run(size: int) -> None:
        found[size] = [model(**calls[size]).loss.item() for _ in range(40)]

    threads = [threading.Thread(target=run, args=(size,)) for size in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == calls.keys()  # none has raised
    assert all(losses == pytest.approx([right[size]] * 40, rel=1e-5) for size, losses in found.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_static_cache_over_two_calls_with_pads_on_the_left(family: str, method: str, wrap: Wrap) -> None:
    model, ids = wrap(family, method), batch(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 4:]
        cache = StaticCache(config=model.backbone.config, max_cache_len=16)
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True)
        found = model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_mix_of_layers_is_unpickled_where_no_base_was_made(task: str, wrap: Wrap, tmp_path: Path) -> None:
    options = {"pooling": "mean"} if task == "SEQ_CLS" else {}
    model = wrap("bert", "p_tuning_v2", task, head_states="mix", **options)
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    with torch.no_grad():
        torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    lines = (
        "import torch",
        f"model, inputs, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)",
        "assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_a_backbone_is_pickled_without_its_wrapper() -> None:
    model = get_ptune_model(build("bert"), PTuneConfig(method="p_tuning_v2"))
    assert pickle.loads(pickle.dumps(model.unwrap())).config.model_type == "bert"


@pytest.mark.parametrize(("family", "method"), KINDS)
def test_a_backbone_may_be_copied_by_itself(family: str, method: str, wrap: Wrap) -> None:
    """Its hooks, and the wrapper behind them, come along."""
    model, inputs = wrap(family, method), batch(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.allclose(copy.deepcopy(model.backbone)(**inputs).logits, expected, atol=1e-10)
