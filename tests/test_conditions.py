"""The injection under everything that a user may switch on."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SEQ2SEQ, batch, build
from tokenizers_of import tokenizer_of
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_ptune import PTuneConfig, PTuneForSeq2SeqLM, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import BackboneError, ConfigError, InjectionError, PTuneError

Wrap = Callable[..., PTunePreTrainedModel]


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "bert", "t5", "bart", "modernbert"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_eager_equals_sdpa(family: str, method: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), batch(family)
    inputs["attention_mask"][1, -2:] = 0
    model.set_attn_implementation("sdpa")
    sdpa = logits(model, **inputs)
    model.set_attn_implementation("eager")
    eager = logits(model, **inputs)
    assert torch.allclose(sdpa[0], eager[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flex_equals_sdpa(family: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning_v2"), batch(family)
    model.float()
    sdpa = logits(model, **inputs)
    model.set_attn_implementation("flex_attention")
    assert torch.allclose(sdpa, logits(model, **inputs), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_given_positions_change_nothing(family: str, method: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), batch(family)
    positions = torch.arange(7)[None].repeat(2, 1)
    assert torch.allclose(logits(model, **inputs), logits(model, **inputs, position_ids=positions), atol=1e-10)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_packed_sequences_equal_single_ones(method: str, wrap: Wrap) -> None:
    model = wrap("llama", method)
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11]])
    packed = torch.cat([first, second], dim=1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    together = logits(model, input_ids=packed, position_ids=positions, use_cache=False)
    alone = torch.cat([logits(model, input_ids=ids) for ids in (first, second)], dim=1)
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_agrees_over_caches(family: str, method: str, padded: bool, wrap: Wrap) -> None:
    model, ids = wrap(family, method).float(), batch(family)["input_ids"]
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = torch.nn.functional.pad(ids, (2, 0)), torch.nn.functional.pad(mask, (2, 0))
    plain: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **plain, use_cache=False)
    assert torch.equal(expected, model.generate(ids, **plain))
    for cache in ("static", "offloaded_static") if family != "bloom" else ("static",):
        if cache == "offloaded_static":
            continue  # needs an accelerator
        found = model.generate(ids, **plain, cache_implementation=cache, disable_compile=True)
        assert torch.equal(expected, found), cache
    beams = model.generate(ids, **plain, num_beams=3)
    assert torch.equal(beams, model.generate(ids, **plain, num_beams=3, use_cache=False))


def test_static_prefill_by_hand(wrap: Wrap) -> None:
    model, ids = wrap("llama", "p_tuning_v2"), batch("llama")["input_ids"]
    cache = StaticCache(config=model.backbone.config, max_cache_len=16)
    assert torch.allclose(logits(model, input_ids=ids), logits(model, input_ids=ids, past_key_values=cache), atol=1e-6)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_cache_reused_over_turns(family: str, method: str, wrap: Wrap) -> None:
    model, ids = wrap(family, method), batch(family)["input_ids"]
    cache = DynamicCache()
    logits(model, input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    later = logits(model, input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
    assert torch.allclose(later, logits(model, input_ids=ids)[:, 4:], atol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]


def test_assisted_decoding_gives_the_same_tokens(wrap: Wrap) -> None:
    model, ids = wrap("llama", "p_tuning_v2"), batch("llama", rows=1)["input_ids"]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assistant = build("llama")
    assert torch.equal(plain, model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant))


def test_inputs_embeds(wrap: Wrap) -> None:
    for family in ("llama", "bert", "roberta"):
        for method in ("prompt_tuning", "p_tuning_v2"):
            model, inputs = wrap(family, method), batch(family)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            by_embeds = logits(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
            by_ids = logits(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            assert torch.allclose(by_embeds, by_ids, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "bloom"])
def test_compiled_equals_eager_execution(family: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning_v2"), batch(family)
    plain = logits(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=family in ("llama", "bert", "t5"))
    assert torch.allclose(plain, logits(compiled, **inputs), atol=1e-6)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"])
def test_what_is_tried_out_first_is_no_part_of_autocast(method: str, wrap: Wrap) -> None:
    """Its casts would serve the pass around it too, on torch 2.8 without gradients, and round what is compared."""
    model, inputs = wrap("llama", method).float().train(), batch("llama")
    around: set[tuple[bool, bool]] = set()
    forward = model.backbone.lm_head.forward

    def watched(states: Any) -> Any:  # a hook would not be called for what is tried
        around.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(states)

    model.backbone.lm_head.forward = watched
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    assert around == {(False, False), (True, True)}
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in model.adapter_parameter_names())


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_prompt_that_was_made_under_autocast_is_not_used_outside_it(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method).float().eval(), batch("llama")
    with torch.no_grad():
        whole = logits(model, **inputs)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                half = logits(model, **inputs)
            assert torch.equal(logits(model, **inputs), whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(model, **inputs), half)
    assert not torch.allclose(half.float(), whole, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("reparameterization", ["MLP", "LSTM"])
def test_a_prompt_is_encoded_in_full_precision_under_autocast(family: str, reparameterization: str, wrap: Wrap) -> None:
    model = wrap(family, "p_tuning", encoder_reparameterization_type=reparameterization).float()
    inputs, encoded = batch(family), model._encode()
    with torch.no_grad():
        whole = logits(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model._encode(), encoded)
        half = logits(model, **inputs)
        assert torch.equal(logits(model, **inputs), half)
        model.train()(**inputs).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.prompt.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in model.prompt.parameters())
    model.eval()
    assert torch.equal(logits(model, **inputs), whole)
    assert torch.allclose(half.float(), whole, atol=0.1 * whole.abs().max().item())


def test_bf16_autocast_and_weights(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning"), batch("llama")
    model.backbone.to(torch.bfloat16)
    loss = model(**inputs).loss
    loss.backward()
    assert all(p.grad is not None for p in model.prompt.parameters())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**inputs).loss)


def test_two_models_do_not_disturb_each_other(wrap: Wrap) -> None:
    first, second = wrap("llama", "p_tuning_v2"), wrap("llama", "prompt_tuning")
    inputs = batch("llama")
    alone = logits(first, **inputs), logits(second, **inputs)
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(number: int, model: Any) -> None:
        for _ in range(20):
            results[number].append(logits(model, **inputs))

    threads = [threading.Thread(target=run, args=(n, m)) for n, m in enumerate((first, second))]
    threads += [threading.Thread(target=run, args=(0, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, alone[n]) for n in (0, 1) for r in results[n])


def test_resized_vocabulary_stays_out_of_the_adapter(wrap: Wrap, tmp_path: Any) -> None:
    model = wrap("llama", "p_tuning_v2")
    model.resize_token_embeddings(105)
    inputs = batch("llama")
    assert logits(model, **inputs).shape[-1] == 105
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 10_000


def test_layers_and_sites(wrap: Wrap) -> None:
    assert wrap("llama", "p_tuning_v2", layers=[-1]).prompt.weight.shape == (4, 2 * 2 * 8)
    assert wrap("t5", "p_tuning_v2", sites=["encoder"]).prompt.weight.shape == (4, 2 * 2 * 32)
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        wrap("llama", "p_tuning_v2", layers=[5])


def test_layers_are_counted_over_those_with_attention() -> None:
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "vocab_size": 99}
    kinds = ["conv", "conv", "full_attention", "full_attention"]
    torch.manual_seed(0)
    hybrid = Lfm2ForCausalLM(Lfm2Config(num_hidden_layers=4, num_key_value_heads=2, layer_types=kinds, **small))
    for layers, expected in (([0], "layers.2."), ([-1], "layers.3.")):
        model = get_ptune_model(hybrid, PTuneConfig(num_virtual_tokens=3, layers=layers))
        assert model._injector is not None
        assert [site.name for site in model._injector.sites] == [f"{expected}self_attn"]
        model.unwrap()
    for outside in (2, -3):
        with pytest.raises(ConfigError, match="layers 0 to 1, or -2 to -1 from the end, counted over"):
            get_ptune_model(hybrid, PTuneConfig(num_virtual_tokens=3, layers=[outside]))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_sites_are_for_prefixes(method: str, wrap: Wrap, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"sites is for prefixes; {method} puts its prompt into the input only"):
        PTuneConfig(method=method, sites=["cross"])
    model = wrap("t5", method)
    model.config.sites = ["cross"]  # as was taken once, and changed nothing
    model.save_pretrained(tmp_path)
    loaded = PTuneForSeq2SeqLM.from_pretrained(tmp_path, backbone=model.unwrap())
    assert loaded.config.sites == ["cross"]
    with pytest.raises(ConfigError, match="sites is for prefixes"):
        get_ptune_model(loaded.unwrap(), loaded.config)


@pytest.mark.parametrize(("name", "value"), [("layers", [0]), ("sites", ["encoder"])])
def test_bitfit_has_neither_layers_nor_sites(name: str, value: list[Any], wrap: Wrap, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} is for prefixes; bitfit has no prompt"):
        PTuneConfig(method="bitfit", **{name: value})
    model = wrap("bert", "bitfit")
    setattr(model.config, name, value)  # as was taken once, and changed nothing
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, backbone=model.unwrap())
    assert getattr(loaded.config, name) == value


@pytest.mark.parametrize("start", ["RANDOM", "SAMPLE_VOCAB", "ZERO"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"])
def test_starts(start: str, method: str, wrap: Wrap) -> None:
    model = wrap("llama", method, strong=False, prompt_tuning_init=start)
    assert torch.isfinite(logits(model, **batch("llama"))).all()


@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [
        ("llama", "p_tuning_v2", "SAMPLE_VOCAB"),
        ("llama", "prompt_tuning", "SAMPLE_VOCAB"),
        ("llama", "prefix_tuning", "SAMPLE_VOCAB"),
        ("llama", "p_tuning", "RANDOM"),  # behind its network
        ("bert", "p_tuning_v2", "RANDOM"),
        ("bert", "prompt_tuning", "RANDOM"),
        ("t5", "p_tuning_v2", "RANDOM"),
        ("bart", "prompt_tuning", "RANDOM"),
    ],
)
def test_decoders_start_from_words(family: str, method: str, expected: str, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap(family, method, strong=False)
    assert model.config.prompt_tuning_init == expected and model.config.over_decoder is (family == "llama")
    model.save_pretrained(tmp_path)
    assert PTuneConfig.from_pretrained(tmp_path).prompt_tuning_init == expected
    torch.manual_seed(2)
    named = get_ptune_model(
        model.unwrap(), PTuneConfig(method=method, num_virtual_tokens=4, prompt_tuning_init=expected)
    )
    same = zip(model.prompt.parameters(), named.prompt.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_prompt_longer_than_a_decoder_s_positions_starts_at_random() -> None:
    build_small = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=200, position_shift=False)
    model = get_ptune_model(build("gpt2", n_positions=64), build_small)
    assert model.config.prompt_tuning_init == "RANDOM"


def test_sampled_tokens_stand_for_text() -> None:
    """Low ids of BERT's vocabulary are [PAD], [CLS] and [unused0] to [unused993]."""
    tokenizer = tokenizer_of("wordpiece", further=" ".join(f"[unused{n}]" for n in range(9)))
    config = PTuneConfig(method="prompt_tuning", num_virtual_tokens=23, prompt_tuning_init="SAMPLE_VOCAB")
    model = get_ptune_model(build("llama"), config, tokenizer)
    rows = model.get_input_embeddings().weight
    drawn = [int((rows == row).all(1).nonzero()) for row in model.prompt.weight]
    assert len(set(drawn)) == 23
    tokens = tokenizer.convert_ids_to_tokens(drawn)
    assert not [t for t in tokens if t in tokenizer.all_special_tokens or t.startswith("[unused")]


def test_random_prompt_has_the_deviation_of_the_embeddings() -> None:
    model = get_ptune_model(
        build("llama"), PTuneConfig(method="prompt_tuning", num_virtual_tokens=500, prompt_tuning_init="RANDOM")
    )
    spread = model.get_input_embeddings().weight.std()
    assert abs(model.prompt.weight.std() / spread - 1) < 0.1


def test_random_prefixes_are_distributed_as_the_backbone_s_own_keys_and_values() -> None:
    """Channel by channel: where one is a hundred times larger than the others, no other one grows."""
    backbone = build("llama")
    large = backbone.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        large[3] *= 100
    model = get_ptune_model(
        backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=400, prompt_tuning_init="RANDOM")
    )
    keys = model.prompt.weight[:, : large.shape[0]].detach()
    with torch.no_grad():
        hidden = backbone.model.layers[0].input_layernorm(backbone.get_input_embeddings().weight)
    own = hidden @ large.T  # before the rotation, which mixes channels in pairs
    ratio = keys.std(0) / own.std(0)
    pairs = [3, 3 + 4]  # channel 3 and the one it rotates with
    others = [c for c in range(len(ratio)) if c not in pairs]
    assert ratio[others].min() > 0.3 and ratio[others].max() < 3 and keys.std(0)[3] > 20 * keys.std(0)[others].max()


def test_a_text_start_is_the_backbone_s_own_keys_and_values() -> None:
    """A prefix that starts from a text answers as the text before the tokens would."""

    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(w) for w in text.split()]}

    ids = batch("llama")["input_ids"]
    for method in ("p_tuning_v2", "prompt_tuning", "prefix_tuning", "p_tuning"):
        config = PTuneConfig(
            method=method, num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="7 8 9"
        )
        model = get_ptune_model(build("llama"), config, Words()).eval()
        text = torch.cat([torch.tensor([[7, 8, 9]] * 2), ids], dim=1)
        assert torch.allclose(logits(model, input_ids=ids), logits(build("llama"), input_ids=text)[:, 3:], atol=1e-5)


def test_class_labels_start_a_prompt() -> None:
    tokenizer = tokenizer_of("wordpiece")
    pieces = tokenizer.convert_tokens_to_ids(["t", "##errible"])
    names = {0: "terrible", 1: "good"}
    backbone = build("bert", num_labels=2, id2label=names, label2id={v: k for k, v in names.items()})
    config = PTuneConfig(method="prompt_tuning", num_virtual_tokens=3, prompt_tuning_init="CLASS_LABELS")
    model = get_ptune_model(backbone, config, tokenizer)
    words = model.get_input_embeddings().weight
    assert torch.allclose(model.prompt.weight[0], words[pieces].mean(0), atol=1e-6)
    assert torch.allclose(model.prompt.weight[1], words[tokenizer.convert_tokens_to_ids("good")], atol=1e-6)
    with pytest.raises(ConfigError, match="needs named labels"):
        get_ptune_model(build("bert"), config, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_quantised_cache_holds_own_tokens_only(method: str) -> None:
    pytest.importorskip("optimum.quanto")
    settings = PTuneConfig(method=method, num_virtual_tokens=4)
    model = get_ptune_model(build("llama", hidden_size=64, head_dim=16).float(), settings).eval()
    ids = batch("llama")["input_ids"]
    cache = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 64}
    plain: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    exact = model.generate(ids, **plain)
    lossy = model.generate(ids, **plain, cache_implementation="quantized", cache_config=cache)
    assert torch.equal(exact.sequences[:, :8], lossy.sequences[:, :8])
    assert lossy.past_key_values.get_seq_length() == ids.shape[1] + 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs an accelerator")
def test_an_offloaded_cache_gives_the_same_tokens(wrap: Wrap) -> None:
    model = wrap("llama", "p_tuning_v2").float().cuda()
    ids = batch("llama")["input_ids"].cuda()
    exact = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(exact, model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="offloaded"))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", ["layers", "all but an attention"])
def test_code_that_is_compiled_in_part(compiled: str, training: bool, method: str, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method).train(training), batch("llama")
    with torch.no_grad():
        expected = model.eval()(**inputs).loss
    model.train(training)
    layers = model.backbone.model.layers
    run = model
    if compiled == "layers":
        for layer in layers:
            layer.compile(backend="eager")
    else:
        layers[0].self_attn.forward = torch._dynamo.disable(layers[0].self_attn.forward)
        run = torch.compile(model, backend="eager")
    loss = run(**inputs).loss
    assert torch.allclose(loss, expected, atol=1e-9)
    loss.backward()
    assert model.prompt.weight.grad.abs().sum() > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cache_comes_in_eval_mode_with_gradients_too(family: str, method: str, wrap: Wrap) -> None:
    model, ids = wrap(family, method), batch(family)["input_ids"]
    first = model(input_ids=ids[:, :4])
    found = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
    assert torch.allclose(found, model(input_ids=ids).logits[:, 4:], atol=1e-9)


def test_an_attention_that_is_set_on_the_base_itself_sees_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register("sdpa_of_its_own", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_of_its_own", sdpa_mask)
    model = get_ptune_model(build("llama"), PTuneConfig(num_virtual_tokens=4)).eval()
    with torch.no_grad():
        model.prompt.weight.normal_(0, 0.5)
        expected = model(**batch("llama")).logits
        model.base_model.set_attn_implementation("sdpa_of_its_own")
        assert torch.allclose(model(**batch("llama")).logits, expected, atol=1e-9)


def test_prompt_and_rows_that_trained_as_one_part_under_another_attention() -> None:
    config = PTuneConfig(method="prompt_tuning", num_virtual_tokens=3, loss_at_labels=False)
    model, inputs = get_ptune_model(build("llama").double(), config), batch("llama")
    gradients = []
    for attention, training in (("sdpa", True), ("eager", True), ("eager", False)):
        model.backbone.set_attn_implementation(attention)
        model.train(training).zero_grad()
        model(**inputs).loss.backward()
        gradients.append(model.prompt.weight.grad.clone())
    assert all(torch.allclose(one, gradients[2], atol=1e-6) for one in gradients)  # eager takes softmax in float32


def test_an_attention_of_two_products_is_refused_where_a_prefix_would_meet_one() -> None:
    """DiffLlama calls what is eager twice, which is how it was wrapped no more."""
    settings = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("diffllama", **settings, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    )
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3)).eval()
    model.set_attn_implementation("eager")
    with pytest.raises(InjectionError, match='attends twice.*attn_implementation="sdpa"'):
        model(**batch("llama"))
    with model.disable_adapter():
        model(**batch("llama"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("place", ["everywhere", "here"])
@pytest.mark.parametrize("around", ["the plain one", "the one in use"])
def test_an_attention_that_is_replaced_meets_the_prompt_once(
    around: str, place: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})
    model = get_ptune_model(build("llama").double(), PTuneConfig(num_virtual_tokens=4)).eval()
    torch.nn.init.normal_(model.prompt.weight, 0, 0.5)
    run = torch.compile(model, backend="eager") if compiled else model
    expected = logits(run, **batch("llama"))
    inner = sdpa_attention_forward if around == "the plain one" else ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    @functools.wraps(inner)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    if place == "everywhere":
        AttentionInterface.register("sdpa", mine)
    else:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    assert torch.allclose(logits(run, **batch("llama")), expected, atol=1e-9)
    assert calls
    torch._dynamo.reset()


def test_masks_that_are_replaced_keep_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALL_MASK_ATTENTION_FUNCTIONS, "_local_mapping", {})
    model = get_ptune_model(build("llama").double(), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).train()
    inputs = batch("llama")
    expected = model(**inputs).logits
    assert model._injector.joins
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: sdpa_mask(*args, **kwargs)
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_wrapper_trains_where_its_base_does(training: bool) -> None:
    config = PTuneConfig(num_virtual_tokens=4, prefix_dropout=0.5)
    model = get_ptune_model(build("llama").train(training), config)
    assert model.prompt is not None
    assert model.training == model.prompt.training == model.backbone.training == training
    with torch.no_grad():
        first, second = (model(**batch("llama")).logits for _ in range(2))
    assert torch.equal(first, second) != training


def test_prefix_dropout_only_while_training(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2", prefix_dropout=0.5), batch("bert")
    assert torch.equal(logits(model, **inputs), logits(model, **inputs))
    model.train()
    assert not torch.equal(logits(model, **inputs), logits(model, **inputs))


def test_the_prompt_is_encoded_once_until_it_changes(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning"), batch("llama")
    calls = []
    model.prompt.register_forward_hook(lambda *_: calls.append(1))
    first = logits(model, **inputs)
    model.generate(inputs["input_ids"], max_new_tokens=4)
    assert len(calls) == 1
    with torch.no_grad():
        model.prompt.embedding.weight.add_(1)
    assert not torch.equal(first, logits(model, **inputs)) and len(calls) == 2


def test_no_attention_is_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=99, state_size=4))
    with pytest.raises(BackboneError, match=r"no attention.*bitfit"):
        get_ptune_model(mamba, PTuneConfig())


@pytest.mark.parametrize("family", ["roberta", "bart"])
def test_prompts_that_a_prefix_cannot_stand_for_are_refused(family: str) -> None:
    """Own positions of these decoders cannot be moved behind the prompt's."""
    backbone = build(family, "CAUSAL_LM", is_decoder=True)
    before = logits(backbone, input_ids=batch("llama")["input_ids"])
    with pytest.raises(BackboneError, match="cannot share its prompt"):
        get_ptune_model(backbone, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4))
    assert torch.equal(before, logits(backbone, input_ids=batch("llama")["input_ids"]))
    get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4))


def test_no_biases_are_refused() -> None:
    with pytest.raises(BackboneError, match="nothing outside its head for bitfit to train"):
        get_ptune_model(build("llama"), PTuneConfig(method="bitfit"))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MASKED_LM"])
def test_biases_of_a_head_alone_are_refused(task: str) -> None:
    backbone = build("modernbert", task)
    assert any(n.endswith("bias") for n, _ in backbone.named_parameters())
    with pytest.raises(BackboneError, match="nothing outside its head"):
        get_ptune_model(backbone, PTuneConfig(method="bitfit"))


def test_wrapping_again_takes_over() -> None:
    backbone = build("llama")
    first = get_ptune_model(backbone, PTuneConfig())
    with pytest.warns(UserWarning, match="takes its place"):
        get_ptune_model(backbone, PTuneConfig())
    with pytest.raises(PTuneError, match="no longer holds"):
        first(**batch("llama"))


def test_config_answers_what_scripts_ask(wrap: Wrap) -> None:
    config = wrap("bert", "p_tuning_v2").config
    assert (config.vocab_size, config.hidden_size, config.num_labels, config.pad_token_id) == (99, 32, 2, 0)
    assert config.is_encoder_decoder is False and config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert wrap("t5", "p_tuning_v2").config.is_encoder_decoder is True
    assert config.tie_word_embeddings is True and wrap("llama", "p_tuning_v2").config.tie_word_embeddings is False


def test_grouped_query_heads_are_counted() -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, vocab_size=99
    )
    model = get_ptune_model(LlamaForCausalLM(config), PTuneConfig(num_virtual_tokens=3))
    assert model.prompt.weight.shape == (3, 2 * 8)


@pytest.mark.parametrize("text", [None, "", " \n\t"])
def test_a_start_from_no_text_is_refused(text: str | None) -> None:
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_text, the text to start from; found"):
        PTuneConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text=text)


def test_an_adapter_that_started_from_blanks_is_loaded_still() -> None:
    saved = get_ptune_model(build("llama"), PTuneConfig()).config.to_dict()
    blank = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "  "}
    assert PTuneConfig.from_dict(saved | blank).prompt_tuning_init_text == "  "


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_start_from_a_text_or_label_without_tokens_is_refused(method: str) -> None:
    config = PTuneConfig(method=method, prompt_tuning_init="TEXT", prompt_tuning_init_text="\u200b")
    nothing = {"input_ids": []}
    with pytest.raises(ConfigError, match=r"prompt_tuning_init_text='\\u200b' has no token to start from; give"):
        get_ptune_model(build("llama"), config, lambda text, add_special_tokens: nothing)
    config = PTuneConfig(method=method, prompt_tuning_init="CLASS_LABELS")
    with pytest.raises(ConfigError, match=r"labels that have tokens; found \{0: 'a', 1: ' '\}"):
        get_ptune_model(
            build("bert", num_labels=2, id2label={0: "a", 1: " "}),
            config,
            lambda text, add_special_tokens: {"input_ids": [5]} if text.strip() else nothing,
        )


def test_a_start_that_fails_leaves_the_backbone_as_it_was() -> None:
    backbone = build("llama")
    before = logits(backbone, **batch("llama"))
    config = PTuneConfig(num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    with pytest.raises(ConfigError, match="tokenizer"):
        get_ptune_model(backbone, config)
    assert all(p.requires_grad for p in backbone.parameters())
    assert torch.equal(logits(backbone, **batch("llama")), before)
    get_ptune_model(backbone, PTuneConfig(num_virtual_tokens=3))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_generating_reports_own_positions_of_the_encoder(
    family: str, settings: dict[str, Any], method: str, wrap: Wrap
) -> None:
    model = wrap(family, method).eval()
    model.set_attn_implementation("eager")
    inputs = batch(family)
    inputs.pop("labels")
    inputs["attention_mask"][1, 5:] = 0
    wanted = {"output_hidden_states": True, "output_attentions": True}
    plan = {"max_new_tokens": 3, "return_dict_in_generate": True, **wanted, **settings}
    told = model.generate(**inputs, **plan)
    once = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :1], **wanted)
    with model.disable_adapter():
        base = model.generate(**inputs, **plan)
    for name in ("encoder_hidden_states", "encoder_attentions"):
        assert [t.shape for t in told[name]] == [t.shape for t in base[name]]
        for told_one, once_one in zip(told[name], once[name], strict=True):
            torch.testing.assert_close(told_one, once_one)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_cross_attentions_keep_all_written_positions(family: str, wrap: Wrap) -> None:
    """Also where as many are written as the encoder reads, virtual ones included."""
    model = wrap(family, "prompt_tuning").eval()
    model.set_attn_implementation("eager")
    ids = batch(family, length=6)["input_ids"]
    written = torch.full((2, 6 + model.config.num_virtual_tokens), 5)
    found = model(input_ids=ids, decoder_input_ids=written, output_attentions=True).cross_attentions
    assert all(one.shape[2:] == (written.shape[1], 6) for one in found)
