"""Damaged and malicious adapters: one clear error each; and saves that are killed at any moment."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ptune import PTuneConfig, PTuneForCausalLM, PTunePreTrainedModel, get_ptune_model
from hf_ptune import adapter_file as files
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError, PTuneError, TaskError
from hf_ptune.injection import find_geometry

Settings = dict[str, Any]
Damage = Callable[[Path], Any]
LOADERS = (AutoModelForCausalLM, PTuneForCausalLM)
P, HEADS, DIM = 4, 2, 8
MOST_BYTES = 64 * 2**20


class Payload:
    """Writes a file where somebody unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch("llama")["input_ids"]).logits
    return found


def weights(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(change: Callable[[Any], Any]) -> Damage:
    def rewritten(body: bytes) -> bytes:
        length = struct.unpack("<Q", body[:8])[0]
        found = json.loads(body[8 : 8 + length])
        changed = change(found)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or found).encode()
        return struct.pack("<Q", len(text)) + text + body[8 + length :]

    return weights(rewritten)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        found = load_file(path)
        change(found)
        save_file(found, path, metadata=metadata)

    return damage


def first(found: dict[str, Any]) -> str:
    return min(n for n in found if n.startswith("prompt."))


def in_its_place(make: Callable[[Path], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.unlink()
        make(path)

    return damage


def a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(folder / "ran")))


def a_sparse_giant(folder: Path) -> None:
    text = json.dumps({"prompt.weight": {"dtype": "F32", "shape": [2**35], "data_offsets": [0, 2**37]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**37)


def twice(found: dict[str, Any]) -> bytes:
    name = first(found)
    return json.dumps(found).replace(f'"{name}"', f'"{name}": {json.dumps(found[name])}, "{name}"', 1).encode()


def overlapping(found: dict[str, Any]) -> None:
    name = first(found)
    found["prompt.more"] = dict(found[name])


def renamed(found: dict[str, torch.Tensor]) -> None:
    found["prompt.else"] = found.pop(first(found))


def replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda t: t.update({first(t): change(t[first(t)]).contiguous()}))


def holding(value: float) -> Damage:
    return tensors(lambda t: t[first(t)].view(-1)[-1:].fill_(value))


WEIGHTS: dict[str, tuple[Damage, type, str]] = {
    "empty": (weights(lambda b: b""), AdapterFileError, "it has 0 bytes"),
    "cut in the header's length": (weights(lambda b: b[:5]), AdapterFileError, "it has 5 bytes"),
    "cut in the header": (weights(lambda b: b[:40]), AdapterFileError, "has 40 bytes itself"),
    "cut in the body": (weights(lambda b: b[:-10]), AdapterFileError, "cut short or damaged"),
    "with more behind it": (weights(lambda b: b + b"more"), AdapterFileError, "cannot be read as safetensors"),
    "random bytes": (weights(lambda b: random.Random(0).randbytes(len(b))), AdapterFileError, "its header has"),
    "zeros": (weights(lambda b: bytes(len(b))), AdapterFileError, "cannot be read as safetensors"),
    "a pickle under its name": (a_pickle, AdapterFileError, "its header has"),
    "a huge header": (weights(lambda b: struct.pack("<Q", 2**62) + b[8:]), AdapterFileError, str(2**62)),
    "a header that is no JSON": (header(lambda h: b"{" * 64), AdapterFileError, "cannot be read as safetensors"),
    "a header of a list": (header(lambda h: b"[1, 2]"), AdapterFileError, "its header is a list"),
    "a header nested too deep": (header(lambda h: b"[" * 99_999), AdapterFileError, "recursion"),
    "an entry that is none": (header(lambda h: h | {first(h): 3}), AdapterFileError, "cannot be read as safetensors"),
    "offsets beyond the file": (
        header(lambda h: h[first(h)].update(data_offsets=[0, 2**40])),
        AdapterFileError,
        "cannot be read as safetensors",
    ),
    "overlapping offsets": (header(overlapping), AdapterFileError, "cannot be read as safetensors"),
    "a name given twice": (header(twice), AdapterFileError, "twice"),
    "a shape that overflows": (
        header(lambda h: h[first(h)].update(shape=[2**40, 2**40])),
        AdapterFileError,
        "cannot be read as safetensors",
    ),
    "sparse and giant": (a_sparse_giant, AdapterFileError, "Cannot allocate memory|other shapes|missing"),
    "structure that is no JSON": (
        header(lambda h: h["__metadata__"].update(ptune="{")),
        AdapterFileError,
        "cannot be read as safetensors",
    ),
    "structure of a list": (header(lambda h: h["__metadata__"].update(ptune="[]")), AdapterFileError, r"is \[\]"),
    "structure of garbage": (
        header(lambda h: h["__metadata__"].update(ptune='{"num_virtual_tokens": "a"}')),
        ConfigError,
        "num_virtual_tokens",
    ),
    "a tensor missing": (tensors(lambda t: t.pop(first(t)) is t.update(o=torch.zeros(1))), AdapterFileError, "missing"),
    "no tensor": (tensors(lambda t: t.clear()), AdapterFileError, "missing"),
    "a tensor renamed": (tensors(renamed), AdapterFileError, "prompt.else"),
    "a weight of the base": (
        tensors(lambda t: t.update({"backbone.model.norm.weight": torch.ones(32)})),
        AdapterFileError,
        "unexpected .*norm.weight",
    ),
    "a tensor more": (tensors(lambda t: t.update({"prompt.more": torch.zeros(1)})), AdapterFileError, "prompt.more"),
    "one row less": (replaced(lambda t: t[1:]), AdapterFileError, "other shapes"),
    "transposed": (replaced(lambda t: t.T if t.dim() > 1 else t[None]), AdapterFileError, "other shapes"),
    "no rows": (replaced(lambda t: t[:0]), AdapterFileError, "other shapes"),
    "integers": (replaced(torch.Tensor.long), AdapterFileError, "I64"),
    "eight-bit floats": (replaced(lambda t: t.to(torch.float8_e4m3fn)), AdapterFileError, "F8_E4M3"),
    "not a number": (holding(float("nan")), AdapterFileError, "not finite"),
    "infinite": (holding(float("-inf")), AdapterFileError, "not finite"),
    "no file": (in_its_place(lambda p: None), AdapterFileError, "has no model.safetensors"),
    "a directory": (in_its_place(Path.mkdir), AdapterFileError, "has no model.safetensors"),
    "a link to nothing": (in_its_place(lambda p: p.symlink_to("gone")), AdapterFileError, "has no model.safetensors"),
    "a pipe": (in_its_place(os.mkfifo), AdapterFileError, "has no model.safetensors"),
    "renamed": (in_its_place(lambda p: (p.parent / "x.safetensors").touch()), AdapterFileError, "model.safetensors"),
}


def text(content: bytes) -> Damage:
    return lambda folder: (folder / "config.json").write_bytes(content)


def config(change: Callable[[Settings], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        change(settings)
        path.write_text(json.dumps(settings))

    return damage


def setting(**values: Any) -> Damage:
    return config(lambda s: s.update(values))


def base(**values: Any) -> Damage:
    return config(lambda s: s["base_config"].update(values))


def geometry(**values: Any) -> Damage:
    return config(lambda s: s["geometry"].update(values))


def site(**values: Any) -> Damage:
    return config(lambda s: s["geometry"]["sites"][0].update(values))


def everywhere(**values: Any) -> Damage:
    """As somebody would who means it: the weights' metadata say the same."""

    def damage(folder: Path) -> None:
        setting(**values)(folder)
        header(lambda h: h["__metadata__"].update(ptune=json.dumps(json.loads(h["__metadata__"]["ptune"]) | values)))(
            folder
        )

    return damage


def another_geometry(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        site(**values)(folder)
        said = json.loads((folder / "config.json").read_text())["geometry"]
        structure = {"geometry": files.digest_of(said)}
        header(
            lambda h: h["__metadata__"].update(ptune=json.dumps(json.loads(h["__metadata__"]["ptune"]) | structure))
        )(folder)

    return damage


def another_base(make: Damage) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "base").mkdir()
        settings = json.loads((folder / "config.json").read_text())
        (folder / "base" / "config.json").write_text(json.dumps(settings["base_config"]))
        make(folder)
        setting(base_model_name_or_path=str(folder / "base"))(folder)

    return damage


def a_pickled_base(folder: Path) -> None:
    torch.save({"model.norm.weight": Payload(folder / "ran")}, folder / "base" / "pytorch_model.bin")


def a_base_with_code(folder: Path) -> None:
    (folder / "base" / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))


def code_in_the_adapter(folder: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    base(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")(folder)


def a_package_in_a_package(folder: Path) -> None:
    (folder / "evil_package" / "inner").mkdir(parents=True)
    (folder / "evil_package" / "__init__.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    (folder / "evil_package" / "inner" / "__init__.py").touch()
    setting(base_model_name_or_path="package:evil_package.inner/base")(folder)


CONFIGS: dict[str, tuple[Damage, type, str]] = {
    "empty": (text(b""), AdapterFileError, "no config.json that can be read"),
    "no JSON": (text(b"{method: 3"), AdapterFileError, "no config.json that can be read"),
    "not text": (text(b"\xff\xfe\x00"), AdapterFileError, "no config.json that can be read"),
    "nested too deep": (text(b"[" * 99_999), AdapterFileError, "no config.json that can be read"),
    "a list": (text(b"[1]"), PTuneError, "config.json"),
    "an empty object": (text(b"{}"), AdapterFileError, "has no config.json, or an empty one"),
    "of another model": (setting(model_type="magic"), ConfigError, "model_type='magic'"),
    "no file": (lambda f: (f / "config.json").unlink(), AdapterFileError, "has no config.json"),
    "a directory": (
        lambda f: (f / "config.json").unlink() or (f / "config.json").mkdir(),
        AdapterFileError,
        "has no config.json",
    ),
    "an unknown method": (setting(method="magic"), ConfigError, "method='magic'"),
    "a method of a list": (setting(method=["p_tuning"]), ConfigError, "method"),
    "another method": (everywhere(method="bitfit"), PTuneError, "unexpected|bias"),
    "minus one token": (setting(num_virtual_tokens=-1), ConfigError, "num_virtual_tokens=-1"),
    "no token": (setting(num_virtual_tokens=0), ConfigError, "num_virtual_tokens=0"),
    "tokens in a string": (setting(num_virtual_tokens="4"), ConfigError, "num_virtual_tokens"),
    "tokens without end": (setting(num_virtual_tokens=10**12), ConfigError, f"num_virtual_tokens={10**12}"),
    "more tokens than the file": (everywhere(num_virtual_tokens=10**6), AdapterFileError, r"\(1000000, "),
    "a huge encoder": (everywhere(encoder_hidden_size=10**12), ConfigError, f"encoder_hidden_size={10**12}"),
    "an encoder without end": (setting(encoder_num_layers=10**12), ConfigError, "encoder_num_layers"),
    "dropout of a string": (setting(encoder_dropout="0.1"), ConfigError, "encoder_dropout"),
    "too much dropout": (setting(prefix_dropout=1.5), ConfigError, "prefix_dropout=1.5"),
    "an unknown start": (setting(prompt_tuning_init="MAGIC"), ConfigError, "prompt_tuning_init='MAGIC'"),
    "an unknown task": (everywhere(task="MAGIC"), TaskError, "'MAGIC' on a LlamaForCausalLM, not CAUSAL_LM"),
    "a task of another class": (everywhere(task="SEQ_CLS"), TaskError, "'SEQ_CLS' on a Llama.*, not CAUSAL_LM"),
    "modules that the base lacks": (everywhere(modules_to_save=["magic"]), BackboneError, "'magic'"),
    "modules that were not saved": (everywhere(modules_to_save=["norm"]), AdapterFileError, "missing .*norm.weight"),
    "modules of a string": (setting(modules_to_save="norm"), ConfigError, "modules_to_save"),
    "layers that the base lacks": (everywhere(layers=[99]), ConfigError, "layers"),
    "layers of an object": (setting(layers={"0": 1}), ConfigError, "layers"),
    "an unknown site": (everywhere(sites=["magic"]), ConfigError, "sites='magic'"),
    "a site that the base lacks": (everywhere(sites=["encoder"], layers=None), PTuneError, "sites|more"),
    "no base": (setting(base_model_name_or_path=None), ConfigError, "base_model_name_or_path"),
    "a base that is not there": (setting(base_model_name_or_path="/not/there"), BackboneError, "'/not/there'"),
    "a base with a null byte": (setting(base_model_name_or_path="a\0b"), BackboneError, "cannot be loaded"),
    "a base outside its package": (
        setting(base_model_name_or_path="package:torch/../../.."),
        BackboneError,
        "has no folder",
    ),
    "a base in a missing package": (setting(base_model_name_or_path="package:nobody/x"), BackboneError, "nobody"),
    "a base that finding would run": (a_package_in_a_package, BackboneError, "names no package"),
    "a base that is the adapter": (
        lambda f: setting(base_model_name_or_path=str(f))(f),
        BackboneError,
        "has no weights for",
    ),
    "a base of an unknown type": (base(model_type="magic"), ConfigError, "model_type='magic'"),
    "a base of a type of a list": (base(model_type=[]), ConfigError, "describes no adapter"),
    "a base of another type": (base(model_type="gpt2"), BackboneError, "is a llama, but"),
    "a base that is an adapter": (base(model_type="ptune"), ConfigError, "model_type='ptune'"),
    "base_config of a list": (setting(base_config=[1]), ConfigError, "base_config"),
    "no base_config": (config(lambda s: s.pop("base_config")), ConfigError, "config.json of .* has no base_config"),
    "an empty base_config": (setting(base_config={}), ConfigError, "config.json of .* has no base_config"),
    "sizes in strings": (base(hidden_size="32"), ConfigError, "hidden_size"),
    "a base of absurd width": (base(hidden_size=10**9), BackboneError, f"hidden_size={10**9} instead of 32"),
    "a base of absurd inner width": (base(intermediate_size=10**12), BackboneError, "intermediate_size"),
    "a base of absurd depth": (base(num_hidden_layers=10**12), ConfigError, "num_hidden_layers"),
    "a base a little deeper": (base(num_hidden_layers=3), BackboneError, "num_hidden_layers=3 instead of 2"),
    "a base of absurd vocabulary": (base(vocab_size=10**9), BackboneError, f"vocab_size={10**9} instead of 99"),
    "labels without end": (base(num_labels=10**12), ConfigError, "num_labels"),
    "labels of its own without end": (setting(num_labels=10**12), ConfigError, "num_labels"),
    "labels of garbage": (base(id2label={"a": 1}), ConfigError, "describes no adapter"),
    "code in the adapter": (code_in_the_adapter, ConfigError, "model_type='evil'"),
    "code in the base": (another_base(a_base_with_code), BackboneError, "cannot be loaded"),
    "a base with a pickle": (another_base(a_pickled_base), BackboneError, "cannot be loaded"),
    "a base without weights": (another_base(lambda f: None), BackboneError, "cannot be loaded"),
    "geometry of a list": (setting(geometry=[1]), ConfigError, "geometry"),
    "geometry without embedding_dim": (config(lambda s: s["geometry"].pop("embedding_dim")), ConfigError, "embedding"),
    "geometry without heads": (config(lambda s: s["geometry"]["sites"][0].pop("heads")), ConfigError, "heads=None"),
    "geometry of garbage": (geometry(sites=["a", 3, None]), ConfigError, "sites holds 'a'"),
    "geometry of strings": (site(heads="2"), ConfigError, "heads='2'"),
    "geometry of absurd heads": (site(heads=10**12), ConfigError, "heads="),
    "geometry of absurd width": (geometry(embedding_dim=10**12), ConfigError, "embedding_dim"),
    "geometry of an unknown place": (site(where="magic"), ConfigError, "where='magic'"),
    "geometry with a site twice": (
        config(lambda s: s["geometry"]["sites"].append(s["geometry"]["sites"][0])),
        ConfigError,
        "2 times",
    ),
    "geometry of other modules": (site(name="layers.0.magic"), BackboneError, "layers.0.magic"),
    "geometry of other modules, vouched for": (
        another_geometry(name="layers.0.magic"),
        BackboneError,
        r"has no \['layers.0.magic'\]",
    ),
    "geometry of other heads": (site(heads=HEADS * 2), PTuneError, "geometry|other shapes"),
    "geometry of fewer, wider heads": (site(heads=1, key_dim=2 * DIM, value_dim=2 * DIM), BackboneError, "geometry"),
}
# transformers reads config.json before it knows whose it is
THEIRS = {
    "empty",
    "no JSON",
    "not text",
    "nested too deep",
    "a list",
    "an empty object",
    "of another model",
    "no file",
    "a directory",
}


@pytest.fixture(scope="module")
def saved(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good adapter of either form: a prefix alone, and a prompt behind its encoder."""
    found = {}
    for method in ("p_tuning_v2", "p_tuning"):
        backbone = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
        model = get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=P))
        found[method] = tmp_path_factory.mktemp(method)
        model.save_pretrained(found[method], flatten=method == "p_tuning_v2")
    return found


@pytest.fixture(params=["p_tuning_v2", "p_tuning"])
def good(request: pytest.FixtureRequest, saved: dict[str, Path]) -> Path:
    return saved[request.param]


def refuse(folder: Path, good: Path, damage: Damage, error: type, message: str, theirs: bool) -> None:
    """Load a damaged copy, and the copy again when it has been restored."""
    shutil.copytree(good, folder)
    damage(folder)
    for loader in LOADERS:
        allowed = (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) if theirs else ()
        begun, before = time.monotonic(), peak_memory()
        with pytest.raises((error, *allowed) if loader is AutoModelForCausalLM else error) as raised:
            loader.from_pretrained(folder)
        taken, grown = time.monotonic() - begun, peak_memory() - before
        if isinstance(raised.value, PTuneError):
            raised.match(message)
            assert len(str(raised.value)) < 2000
        assert taken < 10 and grown < MOST_BYTES and not (folder / "ran").exists()
    shutil.rmtree(folder)
    shutil.copytree(good, folder)
    PTuneForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_damaged_weights(kind: str, good: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "adapter", good, *WEIGHTS[kind], theirs=False)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_damaged_configurations(kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path / "adapter")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    refuse(tmp_path / "adapter", good, *CONFIGS[kind], theirs=kind in THEIRS)


@pytest.mark.parametrize(
    "damage",
    [
        base(auto_map={"AutoModelForCausalLM": "evil.M"}),
        base(attn_implementation="evil/kernel"),
        base(_attn_implementation="evil/kernel"),
        base(transformers_weights="../evil.bin"),
        base(quantization_config={"quant_method": "evil"}),
        setting(attn_implementation="evil/kernel"),
        setting(_attn_implementation="evil/kernel", experts_implementation="evil/kernel"),
        setting(nobody="knows it"),
    ],
)
def test_what_a_configuration_may_not_choose_is_ignored(damage: Damage, good: Path, tmp_path: Path) -> None:
    expected = logits(PTuneForCausalLM.from_pretrained(good))
    shutil.copytree(good, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    for loader in LOADERS:
        assert torch.equal(logits(loader.from_pretrained(tmp_path / "adapter")), expected)


@pytest.fixture(scope="module")
def pair(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[PTunePreTrainedModel, torch.Tensor]]:
    """Two adapters of one base that differ in method and P, and their logits."""
    made = []
    for method, count in (("p_tuning_v2", 3), ("prompt_tuning", 5)):
        backbone = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
        model = get_ptune_model(backbone, PTuneConfig(method=method, num_virtual_tokens=count)).eval()
        with torch.no_grad():
            for parameter in model.prompt.parameters():
                parameter.normal_(0, 0.5)
        made.append((model, logits(model)))
    return made


def which(folder: Path, expected: list[torch.Tensor]) -> int:
    """The one adapter whose logits a folder's are."""
    numbers = []
    for loader in LOADERS:
        found = logits(loader.from_pretrained(folder))
        numbers += [n for n, each in enumerate(expected) if torch.equal(found, each)]
    assert len(numbers) == len(LOADERS) and len(set(numbers)) == 1
    return numbers[0]


class Disk:
    """Lets a number of steps pass, and fails at the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passing: int) -> None:
        self.left = passing
        for module, name in ((os, "replace"), (os, "fsync"), (files, "save_file"), (Path, "mkdir"), (os, "mkdir")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError("no space left on the device")
            return function(*args, **kwargs)

        return call


def failing_saves(model: PTunePreTrainedModel, folder: Path) -> Iterator[int]:
    """Save with a failure at the first step, the second, and so on, until one passes."""
    for passing in range(100):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, passing)
            try:
                model.save_pretrained(folder)
            except OSError as error:
                assert "no space left" in str(error)
        if disk.left >= 0:
            return
        yield passing


def test_a_failing_disk_leaves_the_old_adapter_or_the_new_one(pair: Any, tmp_path: Path) -> None:
    (old, _), (new, _) = pair
    expected = [wanted for _, wanted in pair]
    seen = []
    folder = tmp_path / "adapter"
    old.save_pretrained(folder)
    for _ in failing_saves(new, folder):
        seen.append(which(folder, expected))
        assert not list(folder.glob(".ptune-*"))
        old.save_pretrained(folder)
    assert which(folder, expected) == 1
    assert set(seen) == {0, 1} and seen == sorted(seen) and len(seen) >= 7


def test_a_first_save_that_fails_leaves_nothing_loadable(pair: Any, tmp_path: Path) -> None:
    model, expected = pair[0]
    for passing in failing_saves(model, tmp_path / "adapter"):
        folder = tmp_path / "adapter"
        if not (folder / "model.safetensors").exists():
            with pytest.raises((PTuneError, OSError)):
                PTuneForCausalLM.from_pretrained(folder)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            assert passing > 5 and which(folder, [expected]) == 0
    assert which(tmp_path / "adapter", [expected]) == 0


def test_structure_comes_from_the_weights_and_all_else_from_the_configuration(
    pair: Any, base_folder: Any, tmp_path: Path
) -> None:
    (model, expected), (other, _) = pair
    model.save_pretrained(tmp_path / "adapter")
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "adapter")
    shutil.copytree(base_folder("llama"), tmp_path / "moved")
    setting(base_model_name_or_path=str(tmp_path / "moved"))(tmp_path / "adapter")
    header(
        lambda h: h["__metadata__"].update(ptune=json.dumps(json.loads(h["__metadata__"]["ptune"]) | {"later": [1]}))
    )(tmp_path / "adapter")
    for loader in LOADERS:
        loaded = loader.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(loaded), expected)
        assert (loaded.config.method, loaded.config.num_virtual_tokens) == ("p_tuning_v2", 3)
        assert loaded.config.base_model_name_or_path == str(tmp_path / "moved")
    assert not hasattr(loaded.config, "later")


def test_a_base_that_the_weights_vouch_for_is_not_watched(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    monkeypatch.setattr("hf_ptune.loading.find_geometry", lambda base: watched.append(base) or find_geometry(base))
    PTuneForCausalLM.from_pretrained(good)
    assert not watched
    monkeypatch.setattr("hf_ptune.loading.digest_of", lambda _: "another")
    PTuneForCausalLM.from_pretrained(good)
    assert len(watched) == 1


def test_an_adapter_without_metadata_loads(good: Path, tmp_path: Path) -> None:
    expected = logits(PTuneForCausalLM.from_pretrained(good))
    shutil.copytree(good, tmp_path / "adapter")
    header(lambda h: h.update(__metadata__={"format": "pt"}))(tmp_path / "adapter")
    for loader in LOADERS:
        assert torch.equal(logits(loader.from_pretrained(tmp_path / "adapter")), expected)


def test_what_killed_saves_left_is_removed(pair: Any, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    node = files.platform.node()
    gone = [f".ptune-{node}-{ended.pid}-abc", f".ptune-{node}-{os.getpid()}-abc", ".ptune-abc"]
    kept = [f".ptune-{node}-{os.getppid()}-abc", ".ptune-elsewhere-7-abc", "mine"]
    for name in gone + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    pair[0][0].save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == set(kept)


SAVES = """
import os, sys, torch
from hf_ptune import PTuneForCausalLM
torch.set_num_threads(1)
models = [PTuneForCausalLM.from_pretrained(folder) for folder in sys.argv[2:]]
for line in sys.stdin:
    child = os.fork()  # so that importing is waited for once
    while child == 0:
        models.reverse()
        models[0].save_pretrained(sys.argv[1])
    models.reverse()  # the next one begins with the other adapter
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_a_killed_process_leaves_one_adapter_or_the_other(pair: Any, tmp_path: Path) -> None:
    for number, (model, _) in enumerate(pair):
        model.save_pretrained(tmp_path / str(number))
    expected = [wanted for _, wanted in pair]
    folder, draw = tmp_path / "adapter", random.Random(3)
    started = time.perf_counter()
    pair[0][0].save_pretrained(folder)
    once = time.perf_counter() - started
    command = [sys.executable, "-W", "ignore", "-c", SAVES, *(str(f) for f in (folder, tmp_path / "0", tmp_path / "1"))]
    found = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(20):
            process.stdin.write("save\n")
            child = int(process.stdout.readline())
            time.sleep(once * draw.uniform(0.1, 10))  # in the first save, or in one of the next
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            found.append(which(folder, expected))
        process.stdin.close()
    assert set(found) == {0, 1}
    pair[0][0].save_pretrained(folder)
    assert which(folder, expected) == 0 and not list(folder.glob(".ptune-*"))
