"""Adapters of PEFT and THUDM, both ways, against what those libraries compute; prompts as plain tensors."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import batch, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, PreTrainedModel

from hf_ptune import PTuneConfig, PTuneForSequenceClassification, get_ptune_model
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError, PTuneError
from hf_ptune.injection import body_of
from hf_ptune.injection.positions import learned_table
from hf_ptune.interop import load_peft, load_thudm, prompt_embeds, save_peft, save_prompt_embeds

peft = pytest.importorskip("peft")
VIRTUAL = 4
FAMILIES = ["llama", "gpt2", "qwen3", "bloom"]
METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"]
ENCODER_TASKS = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
FLOAT32_INSIDE = ("llama", "qwen3", "bloom")  # rotations and ALiBi


def theirs_of(family: str, method: str, task: str, folder: Path, **options: Any) -> Any:
    """A PEFT model in float64 whose prompt and head have moved, saved in a folder."""
    settings: dict[str, Any] = {"task_type": task, "num_virtual_tokens": VIRTUAL} | options
    if method == "prompt_tuning":
        config = peft.PromptTuningConfig(**settings)
    elif method == "p_tuning":
        config = peft.PromptEncoderConfig(**settings, encoder_hidden_size=16)
    else:
        projection = method == "prefix_tuning"
        config = peft.PrefixTuningConfig(**settings, prefix_projection=projection, encoder_hidden_size=16)
    model = peft.get_peft_model(build(family, task), config).double().eval()
    move(model)
    model.save_pretrained(folder)
    return model


def ours_of(family: str, method: str, task: str | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_virtual_tokens": VIRTUAL, "encoder_hidden_size": 16} | options
    model = get_ptune_model(build(family, task), PTuneConfig(method=method, **settings)).eval()
    move(model)
    return model


def move(model: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)


def reloaded(family: str, task: str, folder: Path) -> Any:
    base = build(family, task)
    torch.set_default_dtype(torch.float64)  # PEFT makes its prompt in the default type
    try:
        return peft.PeftModel.from_pretrained(base, folder).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def answers(model: Any, family: str) -> list[Tensor]:
    """Outputs at real tokens; PEFT leaves virtual ones in some."""
    inputs = batch(family)
    inputs.pop("labels")
    mask = inputs["attention_mask"]
    mask[1, 5:] = 0
    inputs["input_ids"][1, 5:] = 0  # pooling goes by the pad token
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = inputs["input_ids"][:1].expand(2, -1)
    with torch.no_grad():
        try:
            output = model(**inputs)
        except ValueError as error:
            if isinstance(model, peft.PeftModel) and "does not support past key values" in str(error):
                pytest.skip("PEFT itself finds no cache under its name since transformers 5.24")
            raise
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    found = [t for n in names if (t := getattr(output, n, None)) is not None]
    length = mask.shape[1]
    return [t[:, -length:][mask.bool()] if t.shape[1] in (length, length + VIRTUAL) else t for t in found]


def assert_equal(one: Any, other: Any, family: str) -> None:
    limit = 1e-5 if family in FLOAT32_INSIDE else 1e-9
    for a, b in zip(answers(one, family), answers(other, family), strict=True):
        assert torch.allclose(a, b, atol=limit), (a - b).abs().max()


def assert_moved(model: Any, family: str) -> None:
    with model.disable_adapter():
        base = answers(model, family)
    assert not torch.allclose(base[0], answers(model, family)[0], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_language_models_both_ways(method: str, family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, method, "CAUSAL_LM", tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", build(family))
    assert loaded.config.method == method
    assert loaded.config.flattened == (method in ("p_tuning", "prefix_tuning"))
    assert_equal(loaded, theirs, family)
    assert_moved(loaded, family)
    ours = ours_of(family, method)
    save_peft(ours, tmp_path / "ours")
    assert_equal(ours, reloaded(family, "CAUSAL_LM", tmp_path / "ours"), family)
    assert_equal(ours, load_peft(tmp_path / "ours", build(family)), family)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("task", ENCODER_TASKS)
def test_prefixes_of_encoders_both_ways(task: str, family: str, tmp_path: Path) -> None:
    """PEFT counts positions from P on there: so do its adapters here, and nothing of the base changes; where ours do
    not, a moved table stands in for it over there."""
    for method in ("prefix_tuning", "p_tuning_v2"):
        theirs = theirs_of(family, method, task, tmp_path / method)
        loaded = load_peft(tmp_path / method, build(family, task))
        assert_equal(loaded, theirs, family)
        assert_moved(loaded, family)
        ours = ours_of(family, method, task)
        save_peft(ours, tmp_path / f"{method}-ours")
        assert_equal(ours, reloaded(family, task, tmp_path / f"{method}-ours"), family)
        again = load_peft(tmp_path / f"{method}-ours", build(family, task))
        assert_equal(ours, again, family)
        kept, base = again.backbone.state_dict(), build(family, task).state_dict()
        assert all(torch.equal(kept[n], base[n]) for n in kept if n.endswith("word_embeddings.weight"))
        tables = [n for n in base if n.endswith("position_embeddings.weight")]
        freed = loaded.unwrap().state_dict()
        assert tables and all(torch.equal(freed[n], base[n]) for n in tables)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_shifted_positions_of_encoders(family: str, tmp_path: Path) -> None:
    """Exported without a table, loaded as long as the base can, pads in their place, given positions moved."""
    model = get_ptune_model(
        build(family, "SEQ_CLS"), PTuneConfig(num_virtual_tokens=3, position_shift=True, prompt_tuning_init="ZERO")
    ).eval()
    with torch.no_grad():
        model.prompt.weight.normal_()
    save_peft(model, tmp_path / "ours")
    assert not any("position" in n for n in load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert_equal(model, reloaded(family, "SEQ_CLS", tmp_path / "ours"), family)
    table, first = learned_table(body_of(model.backbone))
    longest = table.num_embeddings - first
    ids = torch.randint(5, 90, (2, longest))
    assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    given = torch.arange(first, first + 6)[None]
    assert torch.equal(model(input_ids=ids[:, :6], position_ids=given).logits, model(input_ids=ids[:, :6]).logits)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_on_decoders_both_ways(family: str, task: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, "p_tuning_v2", task, tmp_path / "theirs")
    assert_equal(load_peft(tmp_path / "theirs", build(family, task)), theirs, family)
    ours = ours_of(family, "p_tuning_v2", task)
    save_peft(ours, tmp_path / "ours")
    assert_equal(ours, reloaded(family, task, tmp_path / "ours"), family)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_input_prompts_of_encoder_decoders_both_ways(method: str, family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, method, "SEQ_2_SEQ_LM", tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", build(family))
    assert_equal(loaded, theirs, family)
    assert_moved(loaded, family)
    ours = ours_of(family, method)
    save_peft(ours, tmp_path / "ours")
    assert_equal(ours, reloaded(family, "SEQ_2_SEQ_LM", tmp_path / "ours"), family)


# RoBERTa's head has a hidden layer, which comes before the one that counts
@pytest.mark.parametrize(("family", "pickled"), [("bert", False), ("bert", True), ("roberta", False)])
def test_the_base_is_loaded_by_name_and_labels_are_counted(
    family: str, pickled: bool, base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(
        base_folder(family, "SEQ_CLS"), num_labels=3, **{"ignore_mismatched_sizes": True}
    )
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL)
    theirs = peft.get_peft_model(base, config).double().eval()
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=not pickled)
    loaded = load_peft(tmp_path / "theirs")
    assert loaded.config.num_labels == 3
    assert_equal(loaded, theirs, family)
    loaded.save_pretrained(tmp_path / "ours")
    assert_equal(PTuneForSequenceClassification.from_pretrained(tmp_path / "ours"), theirs, family)


def test_options_of_transformers_reach_no_base_of_a_peft_folder(
    base_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder("bert", "SEQ_CLS"))
    peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL)).save_pretrained(
        tmp_path
    )
    model, info = PTuneForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, trust_remote_code=True, use_safetensors=True
    )
    assert model.config.num_virtual_tokens == VIRTUAL and not info["missing_keys"]


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": None}, {"trust_remote_code": True}])
def test_a_base_s_code_is_run_where_that_is_asked_for_alone(
    trust: dict[str, Any], base_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would be answered to the question of transformers."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = shutil.copytree(base_folder("gpt2", "CAUSAL_LM"), tmp_path / "base")
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    (base / "code.py").write_text(
        f"import os\nfrom transformers import GPT2Config\nos.makedirs({str(tmp_path / 'ran')!r})\n\n\n"
        "class C(GPT2Config):\n    pass\n"
    )
    content = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "code.C"}}
    (base / "config.json").write_text(json.dumps(content | {"model_type": "unheard"}))
    with contextlib.suppress(BackboneError):
        load_peft(tmp_path / "theirs", **trust)
    assert (tmp_path / "ran").exists() == bool(trust.get("trust_remote_code"))


def test_further_modules_are_kept(tmp_path: Path) -> None:
    theirs = theirs_of("gpt2", "p_tuning_v2", "CAUSAL_LM", tmp_path / "theirs", modules_to_save=["ln_f"])
    loaded = load_peft(tmp_path / "theirs", build("gpt2"))
    assert loaded.config.modules_to_save == ["transformer.ln_f"]
    assert_equal(loaded, theirs, "gpt2")
    save_peft(loaded, tmp_path / "ours")
    assert_equal(loaded, reloaded("gpt2", "CAUSAL_LM", tmp_path / "ours"), "gpt2")


TABLES = {"gpt2": "wte", "llama": "embed_tokens"}  # tied to the head, and not


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_trained_words_answer_alike_in_peft(method: str, family: str, low_memory: bool, tmp_path: Path) -> None:
    """PEFT reads words beside an input prompt, and a tied head, from the base's own table, never from a copy."""
    ours = ours_of(family, method, modules_to_save=[TABLES[family]])
    save_peft(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours", low_cpu_mem_usage=low_memory).eval()
    for a, b in zip(answers(ours, family), answers(theirs, family), strict=True):
        assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()
    assert_equal(ours, load_peft(tmp_path / "ours", build(family)), family)


@pytest.mark.parametrize(
    ("family", "method", "modules", "taken"),
    [
        ("llama", "p_tuning_v2", ["embed_tokens"], True),
        ("bert", "p_tuning_v2", ["word_embeddings"], True),  # PEFT keeps it by two names
        ("bloom", "prompt_tuning", ["word_embeddings"], False),
        ("llama", "prompt_tuning", ["embed_tokens"], False),  # PEFT trains a copy, and reads the base's own
        ("llama", "prompt_tuning", ["lm_head"], True),
        ("gpt2", "p_tuning_v2", ["wte"], False),  # the head stays the base's own
        ("gpt2", "p_tuning_v2", ["lm_head"], False),
        ("gpt2", "p_tuning_v2", ["wte", "lm_head"], False),  # each moved by itself
    ],
)
def test_peft_s_copies_of_words(family: str, method: str, modules: list[str], taken: bool, tmp_path: Path) -> None:
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    theirs = theirs_of(family, method, task, tmp_path, modules_to_save=modules)
    base = build(family, task)
    if taken:
        assert_equal(load_peft(tmp_path, base), theirs, family)
        return
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(ConfigError, match="one weight for both"):
        load_peft(tmp_path, base)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_resized_words_of_peft_are_taken(method: str, base_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Those of a base that got more words are in the folder, under both names of a tied table."""
    folder = base_folder("gpt2", "CAUSAL_LM")
    bases = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    for base in bases:
        base.resize_token_embeddings(101)
    kind = peft.PromptTuningConfig if method == "prompt_tuning" else peft.PrefixTuningConfig
    theirs = peft.get_peft_model(bases[0], kind(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).double().eval()
    move(theirs)
    with pytest.warns(UserWarning, match="resized"):
        theirs.save_pretrained(tmp_path / "theirs")
    assert "base_model.lm_head.weight" in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert_equal(load_peft(tmp_path / "theirs", bases[1].double()), theirs, "gpt2")
    with pytest.raises(AdapterFileError, match="101"):
        load_peft(tmp_path / "theirs", build("gpt2"))


def test_the_module_is_imported_alone_and_without_peft() -> None:
    code = "import sys, hf_ptune.interop; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# what has no equal


@pytest.mark.parametrize(
    ("family", "method", "task", "said"),
    [
        ("bert", "prompt_tuning", "SEQ_CLS", "before the first token"),
        ("roberta", "p_tuning", "TOKEN_CLS", "before the first token"),
        ("t5", "p_tuning_v2", "SEQ_2_SEQ_LM", "decoder's own attention alone"),
        ("bart", "prefix_tuning", "SEQ_2_SEQ_LM", "decoder's own attention alone"),
        ("mistral", "p_tuning_v2", "CAUSAL_LM", "sliding windows"),
    ],
)
def test_prompts_without_an_equal_are_refused(family: str, method: str, task: str, said: str, tmp_path: Path) -> None:
    theirs_of(family, method, task, tmp_path / "theirs")
    backbone, before = build(family, task), build(family, task).state_dict()
    with pytest.raises(ConfigError, match=said):
        load_peft(tmp_path / "theirs", backbone)
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())
    with pytest.raises(ConfigError, match=said):
        save_peft(ours_of(family, method, task), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_peft_s_prompts_of_encoders_really_differ(tmp_path: Path) -> None:
    theirs = theirs_of("bert", "prompt_tuning", "SEQ_CLS", tmp_path / "theirs")
    ours = ours_of("bert", "prompt_tuning", pooling="cls")
    with torch.no_grad():
        ours.prompt.weight.copy_(load_file(tmp_path / "theirs/adapter_model.safetensors")["prompt_embeddings"])
        for name in ("weight", "bias"):
            head = getattr(theirs.base_model.classifier.modules_to_save.default, name)
            getattr(ours.backbone.classifier, name).copy_(head)
    assert not torch.allclose(answers(ours, "bert")[0], answers(theirs, "bert")[0], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "method", "task", "options", "said"),
    [
        ("gpt2", "bitfit", None, {}, "has no bitfit"),
        ("gpt2", "p_tuning_v2", None, {"layers": [1]}, "every layer"),
        ("bart", "p_tuning_v2", None, {"sites": ["decoder"]}, "every layer"),
        ("gpt2", "p_tuning_v2", None, {"position_shift": False}, "positions"),
        ("bert", "p_tuning_v2", "MASKED_LM", {}, "MASKED_LM"),
        ("bert", "p_tuning_v2", "MULTIPLE_CHOICE", {}, "MULTIPLE_CHOICE"),
        ("distilbert", "p_tuning_v2", None, {}, "past_key_values"),
        ("modernbert", "p_tuning_v2", None, {}, "past_key_values"),
    ],
)
def test_what_peft_lacks_is_refused(
    family: str, method: str, task: str | None, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        save_peft(ours_of(family, method, task, **options), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_two_formats_share_no_folder(tmp_path: Path) -> None:
    model = ours_of("gpt2", "p_tuning_v2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="another folder"):
        save_peft(model, tmp_path)
    model.unwrap()
    with pytest.raises(ConfigError, match="unwrapped"):
        save_peft(model, tmp_path / "other")


# folders that are not what they should be


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(**changes: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors: dict[str, Any] = load_file(path) | {n.replace("__", "."): t for n, t in changes.items()}
        save_file({n: t for n, t in tensors.items() if t is not None}, path)

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


class Payload:
    def __reduce__(self) -> Any:
        return print, ("run",)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": Payload()}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (removed("adapter_config.json"), AdapterFileError, "has no adapter_config.json"),
        (removed("adapter_model.safetensors"), AdapterFileError, "has neither"),
        (written("adapter_config.json", "{"), AdapterFileError, "JSON"),
        (written("adapter_config.json", "[]"), AdapterFileError, "an object"),
        (written("adapter_model.safetensors", "cut"), AdapterFileError, "safetensors"),
        (pickled, AdapterFileError, "tensors alone"),
        (settings(peft_type="LORA"), ConfigError, "LORA"),
        (settings(peft_type="IA3"), ConfigError, "IA3"),
        (settings(peft_type=None), ConfigError, "peft_type=None"),
        (settings(task_type="SING"), ConfigError, "SING"),
        (settings(task_type="TOKEN_CLS"), ConfigError, "for TOKEN_CLS, but .* a Bert.*Pass the base as a"),
        (settings(num_virtual_tokens="4"), ConfigError, "num_virtual_tokens"),
        (settings(num_virtual_tokens=9), AdapterFileError, "prompt_embeddings"),
        (weights(prompt_embeddings=None), AdapterFileError, "no prompt_embeddings"),
        (weights(prompt_embeddings=torch.ones(VIRTUAL, 6)), AdapterFileError, "other shapes"),
        (weights(prompt_embeddings=torch.full((VIRTUAL, 128), torch.nan)), AdapterFileError, "not finite"),
        (weights(base_model__classifier__weight=None), AdapterFileError, "missing"),
        (weights(base_model__classifier__weight=torch.ones(5, 32)), AdapterFileError, "other shapes"),
        (weights(base_model__else__weight=torch.ones(1)), BackboneError, "'else'"),
    ],
)
def test_spoilt_folders(spoil: Callable[[Path], None], error: type[Exception], said: str, tmp_path: Path) -> None:
    theirs_of("bert", "p_tuning_v2", "SEQ_CLS", tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=said):
        load_peft(tmp_path, build("bert"))


@pytest.mark.parametrize("base", [None, "../../secret", "no/such-base", "package:json/../.."])
def test_bases_that_cannot_be_loaded(base: str | None, tmp_path: Path) -> None:
    theirs_of("bert", "p_tuning_v2", "SEQ_CLS", tmp_path)
    settings(base_model_name_or_path=base)(tmp_path)
    with pytest.raises((ConfigError, BackboneError)):
        load_peft(tmp_path)
    with pytest.raises(AdapterFileError):
        load_peft(tmp_path / "no-such-folder")


# THUDM's checkpoints


class Reference(nn.Module):
    """What P-tuning-v2 computes: a cache of the prefix's keys and values, a pooler or states, one layer."""

    def __init__(self, family: str, task: str, projected: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.name, self.pooled = family, task == "SEQ_CLS"
        self.body: PreTrainedModel = build(family, "FEATURE_EXTRACTION")
        width = 2 * 2 * 32  # layers, keys and values, hidden
        self.embedding = nn.Embedding(VIRTUAL, 32 if projected else width).double()
        self.trans = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, width)).double() if projected else None
        self.classifier = nn.Linear(32, 2).double()

    def checkpoint(self) -> dict[str, Tensor]:
        kept = {f"{self.name}.{n}": t for n, t in self.body.state_dict().items()}
        kept |= {f"prefix_encoder.embedding.{n}": t for n, t in self.embedding.state_dict().items()}
        if self.trans is not None:
            kept |= {f"prefix_encoder.trans.{n}": t for n, t in self.trans.state_dict().items()}
        return kept | {f"classifier.{n}": t for n, t in self.classifier.state_dict().items()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        rows = input_ids.shape[0]
        encoded = self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)
        prefix = encoded[None].expand(rows, -1, -1).reshape(rows, VIRTUAL, 2 * 2, 4, 8)
        cache = DynamicCache(list(prefix.permute(2, 0, 3, 1, 4).split(2)))
        mask = torch.cat([attention_mask.new_ones(rows, VIRTUAL), attention_mask], dim=1)
        output = self.body(input_ids, attention_mask=mask, past_key_values=cache)
        return SimpleNamespace(
            logits=self.classifier(output.pooler_output if self.pooled else output.last_hidden_state)
        )


def seated(reference: Reference, task: str) -> PreTrainedModel:
    """A backbone with the reference's body."""
    backbone = build(reference.name, task)
    backbone.base_model.load_state_dict(reference.body.state_dict(), strict=False)
    return backbone


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_thudm_checkpoints(task: str, family: str, projected: bool, tmp_path: Path) -> None:
    reference = Reference(family, task, projected)
    checkpoint = reference.checkpoint()
    loaded = load_thudm(checkpoint, seated(reference, task))
    assert loaded.config.method == ("prefix_tuning" if projected else "p_tuning_v2")
    assert_equal(loaded, reference, family)
    assert_moved(loaded, family)
    torch.save(checkpoint, tmp_path / "pytorch_model.bin")
    save_file(checkpoint, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert_equal(load_thudm(tmp_path / name, seated(reference, task)), reference, family)


def test_thudm_prefix_without_a_head_leaves_the_head() -> None:
    reference = Reference("bert", "TOKEN_CLS", False)
    backbone = seated(reference, "TOKEN_CLS")
    reference.classifier.load_state_dict(backbone.classifier.state_dict())
    alone = {n: t for n, t in reference.checkpoint().items() if n.startswith("prefix_encoder.")}
    assert_equal(load_thudm(alone, backbone), reference, "bert")


def test_thudm_refusals(tmp_path: Path) -> None:
    reference = Reference("bert", "SEQ_CLS", False)
    checkpoint = reference.checkpoint()
    with pytest.raises(AdapterFileError, match=r"no prefix_encoder\.embedding"):
        load_thudm({"classifier.weight": torch.ones(2, 32)}, build("bert"))
    with pytest.raises(BackboneError, match="another base"):
        moved = checkpoint["bert.embeddings.word_embeddings.weight"] + 1
        load_thudm(checkpoint | {"bert.embeddings.word_embeddings.weight": moved}, seated(reference, "SEQ_CLS"))
    alone = {"prefix_encoder.embedding.weight": torch.ones(VIRTUAL, 12)}
    with pytest.raises(AdapterFileError, match="other shapes"):
        load_thudm(alone, build("bert"))
    with pytest.raises(AdapterFileError, match="not finite"):
        load_thudm({"prefix_encoder.embedding.weight": torch.full((2, 2), torch.inf)}, build("bert"))
    whole = {"prefix_encoder.embedding.weight": torch.ones(VIRTUAL, 128)}
    for family in ("t5", "deberta-v2", "modernbert"):
        with pytest.raises(PTuneError):
            load_thudm(whole, build(family))
    (tmp_path / "cut.bin").write_text("cut")
    with pytest.raises(AdapterFileError, match="tensors alone"):
        load_thudm(tmp_path / "cut.bin", build("bert"))


# plain prompts


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_prompt_embeds_stand_before_a_text(method: str, tmp_path: Path) -> None:
    model = ours_of("gpt2", method)
    save_prompt_embeds(model, tmp_path / "prompt.pt")
    prompt = torch.load(tmp_path / "prompt.pt", weights_only=True)
    assert prompt.shape == (VIRTUAL, 32) and not prompt.requires_grad
    assert torch.equal(prompt, prompt_embeds(model))
    ids = batch("gpt2")["input_ids"]
    words = build("gpt2").get_input_embeddings()(ids)
    with torch.no_grad():
        served = build("gpt2")(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), words], dim=1)).logits
        assert torch.allclose(model(input_ids=ids).logits, served[:, VIRTUAL:], atol=1e-9)


@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning", "bitfit"])
def test_prefixes_have_no_prompt_embeds(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing among the inputs"):
        save_prompt_embeds(ours_of("gpt2", method), tmp_path / "prompt.pt")
