"""Push and pull against a Hub that fails: one commit, nothing lost, nothing half-written, no wrong answer."""

import io
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from families import batch, build
from hub import HubServer, client_environment, connect
from huggingface_hub import HfApi, ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_ptune import PTuneConfig, PTuneForCausalLM, get_ptune_model
from hf_ptune import hub as pushing
from hf_ptune.cli import main, make_parser
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError, HubError, PTuneError
from hf_ptune.facts import facts_of
from hf_ptune.hub import adapter_files, push_folder
from hf_ptune.info import describe_adapter
from hf_ptune.publishing import push_finished, write_repository

ADAPTER = "alice/adapter"
TOKEN = "alice-writes"


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(98)} | {"[UNK]": 98}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="[UNK]")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a tiny base on it, a client in this process, and no waiting between tries."""
    with HubServer() as hub:
        hub.add_user("alice", TOKEN)
        hub.add_user("alice", "alice-reads", write=False)
        hub.add_user("bob", "bob-writes")
        base = tmp_path / "base"
        build("llama").float().save_pretrained(base)
        words().save_pretrained(base)
        (base / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n# A tiny base\n")
        hub.add_repo("alice/base", {p.name: p.read_bytes() for p in base.iterdir()})
        connect(monkeypatch, hub)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "default"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # both remember the Hub of their first call
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(pushing, "_wait", lambda *_: 0.0)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "token": TOKEN}


@pytest.fixture
def model(server: HubServer, cache: dict[str, Any]) -> Any:
    """An adapter on the base that the Hub holds."""
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_pretrained("alice/base", **cache)
    return get_ptune_model(backbone, PTuneConfig(method="prefix_tuning", num_virtual_tokens=3)).eval()


@pytest.fixture
def finished(model: Any, tmp_path: Path) -> Path:
    return write_repository(model, tmp_path / "finished", ADAPTER, tokenizer=words())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batch("llama")["input_ids"]).logits


def commits(server: HubServer) -> int:
    """Commits of the adapter beyond the Hub's own first one."""
    return len(server.repos[ADAPTER].commits) - 1 if ADAPTER in server.repos else 0


def check_pushed(server: HubServer, folder: Path) -> None:
    files = HfApi(token=TOKEN).list_repo_files(ADAPTER)
    assert set(adapter_files(folder)) <= set(files)
    assert commits(server) == 1


def test_a_stranger_loads_what_was_pushed(server: HubServer, model: Any, tmp_path: Path) -> None:
    url = model.push_to_hub(ADAPTER, token=TOKEN, tokenizer=words())
    assert url == f"{server.url}/{ADAPTER}" and commits(server) == 1
    fresh = {"cache_dir": tmp_path / "other", "token": TOKEN}
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, **fresh)
    assert isinstance(loaded, PTuneForCausalLM) and loaded.config.flattened
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert loaded.config.base_model_revision == server.repos["alice/base"].at().id
    pipe = pipeline("text-generation", model=loaded, tokenizer=AutoTokenizer.from_pretrained(ADAPTER, **fresh))
    assert pipe("w3 w4", max_new_tokens=2)[0]["generated_text"].startswith("w3 w4")
    card = ModelCard.load(ADAPTER, token=TOKEN).data
    assert card.base_model == "alice/base" and card.pipeline_tag == "text-generation"
    assert card.license == "bsd-3-clause"


@pytest.mark.parametrize(
    ("link", "whole"), [("LICENSE.md", "{url}/alice/base/blob/main/LICENSE.md"), ("https://a.b/c", "https://a.b/c")]
)
def test_a_licence_of_the_base_s_own_keeps_its_name(link: str, whole: str, server: HubServer, model: Any) -> None:
    told = f"license: other\nlicense_name: tiny-license\nlicense_link: {link}\n"
    server.add_repo("alice/base", {"README.md": f"---\n{told}---\n# A tiny base\n".encode()})
    model.push_to_hub(ADAPTER, token=TOKEN, tokenizer=words())
    card = ModelCard.load(ADAPTER, token=TOKEN).data
    assert (card.license, card.license_name) == ("other", "tiny-license")
    assert card.license_link == whole.format(url=server.url)


def test_pipeline_loads_by_id(server: HubServer, model: Any, tmp_path: Path) -> None:
    model.push_to_hub(ADAPTER, token=TOKEN, tokenizer=words())
    pipe = pipeline(model=ADAPTER, token=TOKEN, model_kwargs={"cache_dir": tmp_path / "other"})
    assert type(pipe.model).__name__ == "PTuneForCausalLM" and pipe.task == "text-generation"


def test_a_gated_adapter_wants_a_grant(server: HubServer, finished: Path, tmp_path: Path) -> None:
    push_folder(finished, ADAPTER, token=TOKEN)
    repo = server.repos[ADAPTER]
    repo.gated = "manual"
    with pytest.raises(OSError, match="gated"):
        AutoModelForCausalLM.from_pretrained(ADAPTER, cache_dir=tmp_path / "bob", token="bob-writes")
    repo.readers.add("bob")
    assert AutoModelForCausalLM.from_pretrained(
        ADAPTER, cache_dir=tmp_path / "bob", token="bob-writes"
    ).config.flattened


def test_a_gated_base_says_how_to_get_access(server: HubServer, finished: Path, tmp_path: Path) -> None:
    server.repos["alice/base"].gated = "manual"
    with pytest.raises(BackboneError, match=r"'alice/base' cannot be loaded.*Ask for access") as caught:
        AutoModelForCausalLM.from_pretrained(finished, cache_dir=tmp_path / "bob", token="bob-writes")
    assert "base_model_name_or_path" not in str(caught.value)


def test_the_reparameterisation_is_kept_on_request(server: HubServer, model: Any, tmp_path: Path) -> None:
    model.push_to_hub(ADAPTER, token=TOKEN, tokenizer=words(), keep_encoder=True, private=True)
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, cache_dir=tmp_path / "other", token=TOKEN)
    assert not loaded.config.flattened and type(loaded.prompt) is type(model.prompt)
    with pytest.raises(OSError, match="not a valid model identifier|gated|private|404|401"):
        AutoModelForCausalLM.from_pretrained(ADAPTER, cache_dir=tmp_path / "third", token=False)


@pytest.mark.parametrize(
    ("method", "path", "kind", "storage"),
    [
        (*fault, storage)
        for fault in (
            ("POST", "/api/repos/create", 429),
            ("POST", "/api/repos/create", 503),
            ("POST", "/api/repos/create", "reset"),
            ("POST", "/api/repos/create", "lose_response"),
            ("POST", "preupload", 429),
            ("POST", "preupload", 500),
            ("POST", "preupload", "reset"),
            ("POST", "/commit/", 429),
            ("POST", "/commit/", 500),
            ("POST", "/commit/", 503),
            ("POST", "/commit/", "reset"),
            ("POST", "/commit/", "lose_response"),
            ("POST", "validate-yaml", 503),
            ("GET", "/api/models/", 503),
            ("GET", "/api/models/", "reset"),
            ("POST", "objects/batch", 503),
            ("PUT", "", 500),
            ("PUT", "", "reset"),
        )
        for storage in ("lfs", "regular")
        if storage == "lfs" or fault[1] not in ("objects/batch", "")  # regular files go with the commit
    ],
)
def test_a_push_that_meets_a_fault_ends_in_one_commit(
    server: HubServer, finished: Path, method: str, path: str, kind: Any, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.regular_only = storage == "regular"
    connect(monkeypatch, server, xet=server.regular_only)
    fault = server.fail(method, path, kind, retry_after=0 if kind == 429 else None)
    push_folder(finished, ADAPTER, token=TOKEN)
    assert fault.hits
    check_pushed(server, finished)
    server.clear_faults()
    push_folder(finished, ADAPTER, token=TOKEN)  # nothing has changed
    assert commits(server) == 1


def test_a_push_that_somebody_else_s_comes_between_looks_again(
    server: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, commit = server.add_repo(ADAPTER), HfApi.create_commit

    def late(*arguments: Any, **options: Any) -> Any:
        if commits(server) == 0:
            theirs = {"adapter_config.json": b"{}", "notes.txt": b"theirs", "README.md": b"# Mine\n"}
            repo.commit(theirs, "In between")
        return commit(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    push_folder(finished, ADAPTER, token=TOKEN)
    files = repo.at().files
    assert [entry.status for entry in server.requests("POST", "/commit/")] == [412, 200] and commits(server) == 2
    assert "adapter_config.json" not in files and "notes.txt" in files and "model.safetensors" in files
    assert repo.at().files["README.md"].content == b"# Mine\n"


def test_a_push_that_fails_for_good_says_how_to_go_on(
    server: HubServer, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("POST", "/commit/", 503, times=None)
    with pytest.raises(HubError, match=r"hf-ptune push (\S+) alice/adapter") as raised:
        model.push_to_hub(ADAPTER, token=TOKEN, tokenizer=words())
    folder = str(raised.value).rsplit("hf-ptune push ", 1)[1].split()[0]
    assert commits(server) == 0
    server.clear_faults()
    assert main(["push", folder, ADAPTER]) == 0
    assert capsys.readouterr().out.strip() == f"{server.url}/{ADAPTER}"
    check_pushed(server, Path(folder))


@pytest.mark.parametrize(("token", "status"), [("alice-reads", "403"), ("bob-writes", "403"), ("nobody", "401")])
def test_a_refused_push_is_not_repeated(server: HubServer, finished: Path, token: str, status: str) -> None:
    with pytest.raises(HubError, match=status):
        push_folder(finished, ADAPTER, token=token)
    assert len(server.requests("POST", "/api/repos/create")) == 1 and commits(server) == 0


def test_branches(server: HubServer, finished: Path, cache: dict[str, Any]) -> None:
    push_folder(finished, ADAPTER, token=TOKEN)
    (finished / "README.md").write_text((finished / "README.md").read_text() + "\nMore.\n")
    push_folder(finished, ADAPTER, token=TOKEN, revision="second")
    assert AutoModelForCausalLM.from_pretrained(ADAPTER, revision="second", **cache).config.method == "prefix_tuning"
    text = {r: ModelCard.load(ADAPTER, token=TOKEN).text for r in ("main",)}
    assert "More." not in text["main"]


@pytest.mark.parametrize("storage", ["lfs", "regular"])
@pytest.mark.parametrize("kind", [None, 503, "reset", "lose_response"])
def test_one_pull_request_is_opened_whatever_happens(
    server: HubServer, finished: Path, kind: Any, storage: str, monkeypatch: pytest.MonkeyPatch, cache: dict[str, Any]
) -> None:
    """By its owner, who may push too, and by somebody who may only ask where LFS is not in the way."""
    server.regular_only = storage == "regular"
    server.add_repo(ADAPTER)
    fault = None if kind is None else server.fail("POST", "/commit/", kind)
    token = "bob-writes" if server.regular_only else TOKEN
    push_folder(finished, ADAPTER, token=token, create_pr=True)
    assert fault is None or fault.hits
    assert commits(server) == 1 and len(server.repos[ADAPTER].pull_requests) == 1
    assert "config.json" not in server.repos[ADAPTER].at().files
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, revision="refs/pr/1", **cache)
    assert loaded.config.method == "prefix_tuning"
    push_folder(finished, ADAPTER, token=token, revision="refs/pr/1")  # nothing has changed
    assert commits(server) == 1


def test_another_model_is_not_pushed(server: HubServer, tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="has model_type='bert', expected .*: it describes no adapter"):
        push_finished(tmp_path / "whole", ADAPTER, token=TOKEN)
    assert commits(server) == 0


@pytest.mark.parametrize(("base", "said"), [("here", "which nobody else has"), ("package:a/b", "needs that package")])
def test_a_base_that_others_lack_is_told(
    base: str, said: str, server: HubServer, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = finished / "config.json"
    told = str(tmp_path) if base == "here" else base
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": told}))
    push_finished(finished, ADAPTER, token=TOKEN)
    assert said in caplog.text and commits(server) == 1


def test_what_is_no_adapter_is_not_pushed(server: HubServer, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"config.json, model.safetensors missing"):
        push_folder(tmp_path, ADAPTER, token=TOKEN)
    for name in ("checkpoint-2/model.safetensors", "optimizer.pt", "training_args.bin", ".cache/x", "_tmp"):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_text("x")
    (finished / "outside").symlink_to(tmp_path / "base" / "config.json")
    assert not {
        "checkpoint-2/model.safetensors",
        "optimizer.pt",
        "training_args.bin",
        ".cache/x",
        "_tmp",
        "outside",
    } & (set(adapter_files(finished)))


def test_a_snapshot_of_the_cache_is_pushed_whole(
    server: HubServer, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_folder(finished, ADAPTER, token=TOKEN)
    snapshot = Path(huggingface_hub.snapshot_download(ADAPTER, cache_dir=tmp_path / "cache", token=TOKEN))
    assert (snapshot / "config.json").is_symlink()
    (snapshot / "outside").symlink_to(tmp_path / "base" / "config.json")
    assert main(["push", str(snapshot), "alice/copy"]) == 0
    files = set(HfApi(token=TOKEN).list_repo_files("alice/copy"))
    assert files == set(adapter_files(finished)) | {".gitattributes"}


@pytest.mark.parametrize("kind", [None, 503, "lose_response"])
def test_a_push_over_a_peft_adapter_leaves_nothing_of_it(
    server: HubServer, model: Any, finished: Path, cache: dict[str, Any], kind: Any
) -> None:
    foreign = {name: b"{}" for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")}
    server.add_repo(ADAPTER, foreign | {"notes.txt": b"kept"})
    before = commits(server)
    if kind is not None:
        server.fail("POST", "/commit/", kind)
    push_folder(finished, ADAPTER, token=TOKEN)
    files = set(HfApi(token=TOKEN).list_repo_files(ADAPTER))
    assert commits(server) == before + 1 and not files & set(foreign) and "notes.txt" in files
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)), logits(model), atol=1e-5)


@pytest.mark.parametrize("kind", [None, 503, "lose_response"])
def test_a_card_that_somebody_wrote_is_kept(
    server: HubServer, finished: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    server.add_repo(ADAPTER, {"README.md": b"---\ntags: [mine]\n---\n# Mine\n"})
    before = commits(server)
    for path in ("/commit/", "README.md"):
        if kind is not None:
            server.fail(None, path, kind)
    push_folder(finished, ADAPTER, token=TOKEN)
    files = server.repos[ADAPTER].at().files
    assert b"# Mine" in files["README.md"].content and "model.safetensors" in files
    assert commits(server) == before + 1 and "is no card of this package" in caplog.text
    (finished / "README.md").write_text("# Another of ours\n")
    push_folder(finished, ADAPTER, token=TOKEN)  # facts of a run are there by now
    assert b"# Mine" in server.repos[ADAPTER].at().files["README.md"].content


@pytest.mark.parametrize("card", [b"---\ntags: [a\nb: ]: c\n---\n# Mine\n", b"---\njust words\n---\n# Mine\n"])
def test_a_card_whose_metadata_cannot_be_read_is_kept(server: HubServer, finished: Path, card: bytes) -> None:
    server.add_repo(ADAPTER, {"README.md": card})
    push_folder(finished, ADAPTER, token=TOKEN)
    files = server.repos[ADAPTER].at().files
    assert files["README.md"].content == card and "model.safetensors" in files


def test_a_private_adapter_that_was_loaded_with_a_token_is_pushed_with_its_facts_and_tokenizer(
    server: HubServer, model: Any, finished: Path, cache: dict[str, Any]
) -> None:
    facts = facts_of(model)
    facts.metrics = [{"accuracy": 0.9}]
    facts.save(finished)
    push_folder(finished, ADAPTER, token=TOKEN, private=True)
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)
    loaded.push_to_hub("alice/again", token=TOKEN, private=True)
    files = server.repos["alice/again"].at().files
    assert json.loads(files["run_facts.json"].content)["metrics"] == [{"accuracy": 0.9}]
    assert files["tokenizer.json"].content == (finished / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("card", [b"---\nlicense: mit\n---\n", b"---\ntags: [hf_ptune]\n---\n# Ours\n"])
def test_a_card_that_says_nothing_or_is_ours_gives_way(server: HubServer, finished: Path, card: bytes) -> None:
    server.add_repo(ADAPTER, {"README.md": card})
    push_folder(finished, ADAPTER, token=TOKEN)
    assert server.repos[ADAPTER].at().files["README.md"].content == (finished / "README.md").read_bytes()


def test_the_command_after_a_failed_push_is_the_whole_one(server: HubServer, finished: Path, tmp_path: Path) -> None:
    folder = finished.rename(tmp_path / "my adapter")
    options: dict[str, Any] = {"private": True, "revision": "next", "create_pr": True, "commit_message": "Say it"}
    options["commit_description"] = "it's so"
    server.fail("POST", "/api/repos/create", 503, times=None)
    with pytest.raises(HubError, match="push it again: hf-ptune push") as raised:
        push_folder(folder, ADAPTER, token=TOKEN, **options)
    words = shlex.split(str(raised.value).split("push it again: ")[1])
    given = vars(make_parser().parse_args(words[1:]))
    assert (given["folder"], given["repo_id"]) == (str(folder), ADAPTER)
    assert {k: given[k] for k in options} == options and TOKEN not in str(raised.value)


def test_links_are_followed_within_a_folder_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "config.json").rename(finished / "real.json")
    (finished / "config.json").symlink_to("real.json")
    assert "config.json" in adapter_files(finished)
    (finished / "model.safetensors").rename(tmp_path / "elsewhere")
    (finished / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert main(["push", str(finished), ADAPTER]) == 2
    assert "model.safetensors" in (said := capsys.readouterr().err) and "link to outside" in said


def test_the_trainer_pushes_a_finished_adapter(server: HubServer, model: Any, tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in batch("llama").items()} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id=ADAPTER,
        hub_token=TOKEN,
        hub_strategy="every_save",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=words())
    trainer.train()
    trainer.push_to_hub()
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, cache_dir=tmp_path / "other", token=TOKEN)
    assert loaded.config.flattened and torch.allclose(logits(loaded), logits(model.eval()), atol=1e-5)
    card = ModelCard.load(ADAPTER, token=TOKEN)
    assert "hf_ptune" in card.data.tags and "generated_from_trainer" not in card.content
    assert len(server.requests("POST", "/api/repos/create")) == 1
    trainer.push_to_hub(keep_encoder=True)
    whole = AutoModelForCausalLM.from_pretrained(ADAPTER, cache_dir=tmp_path / "third", token=TOKEN)
    assert not whole.config.flattened and type(whole.prompt) is type(model.prompt)


@pytest.mark.parametrize("storage", ["lfs", "regular"])
@pytest.mark.parametrize("at", [0, 9, 100, None])
def test_a_flipped_byte_is_an_error_and_the_cache_stays_usable(
    server: HubServer, model: Any, finished: Path, cache: dict[str, Any], storage: str, at: int | None
) -> None:
    server.regular_only = storage == "regular"
    push_folder(finished, ADAPTER, token=TOKEN)
    fault = server.fail("GET", f"{ADAPTER}/resolve/", "corrupt", times=None, at=at)
    fault.path = server.repos[ADAPTER].at().id + "/model.safetensors"
    with pytest.raises(AdapterFileError, match="damaged on its way"):
        AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)
    assert fault.hits
    server.clear_faults()
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)), logits(model), atol=1e-5)


@pytest.mark.parametrize("kind", [500, 503, "reset", "reset_in_body", "truncate", "delay"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("xet", [False, True])
def test_a_pull_that_meets_a_fault_succeeds_or_can_be_repeated(
    server: HubServer,
    model: Any,
    finished: Path,
    cache: dict[str, Any],
    kind: Any,
    name: str,
    xet: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push_folder(finished, ADAPTER, token=TOKEN)
    connect(monkeypatch, server, xet=xet)
    commit = server.repos[ADAPTER].at().id
    fault = server.fail("GET", f"{commit}/{name}", kind, seconds=0.2)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)
    except Exception as error:
        assert isinstance(error, (OSError, PTuneError)) or type(error).__module__.startswith("http")  # no slip of ours
        loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)
    assert fault.hits
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_a_warm_cache_serves_offline(
    server: HubServer, model: Any, finished: Path, cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder(finished, ADAPTER, token=TOKEN)
    AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)
    server.fail(None, "", "reset", times=None)
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, local_files_only=True, **cache)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_the_commit_of_a_base_is_read_from_the_cache(server: HubServer, tmp_path: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained("alice/base", cache_dir=tmp_path / "default", token=TOKEN)
    config = get_ptune_model(backbone, PTuneConfig(num_virtual_tokens=2)).config
    assert config.base_model_revision == server.repos["alice/base"].at().id


def test_a_base_of_another_branch_is_pinned_to_its_commit(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the main branch is in the cache as well or not; a base that has been trained since is of no commit."""
    monkeypatch.setattr(logging.getLogger("hf_ptune.pinning"), "propagate", True)
    first = server.repos["alice/base"].at().id
    torch.manual_seed(5)
    build("llama", initializer_range=0.1).float().save_pretrained(tmp_path / "newer")
    files = {p.name: p.read_bytes() for p in (tmp_path / "newer").iterdir()}
    server.repos["alice/base"].commit(files, "New weights")
    where = {"cache_dir": tmp_path / "default", "token": TOKEN}
    for also_main in (False, True):
        if also_main:
            AutoModelForCausalLM.from_pretrained("alice/base", **where)
        base = AutoModelForCausalLM.from_pretrained("alice/base", revision=first, **where)
        assert get_ptune_model(base, PTuneConfig(num_virtual_tokens=2)).config.base_model_revision == first
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1)
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=2))
    assert model.config.base_model_revision is None and "pins none" in caplog.text
    model.push_to_hub("alice/rev", token=TOKEN, tokenizer=words())
    config = PTuneConfig.from_pretrained("alice/rev", token=TOKEN)
    assert config.base_model_revision is None


def test_the_base_is_taken_at_its_commit(server: HubServer, model: Any, cache: dict[str, Any], tmp_path: Path) -> None:
    model.push_to_hub(ADAPTER, token=TOKEN, tokenizer=words())
    expected = logits(model)
    torch.manual_seed(5)
    other = build("llama").float()
    other.lm_head.weight.data.normal_()
    other.save_pretrained(tmp_path / "newer")
    newer = {p.name: p.read_bytes() for p in (tmp_path / "newer").iterdir()}
    server.repos["alice/base"].commit(newer, "New weights")
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, **cache)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


def test_without_the_import_it_takes_trust(server: HubServer, finished: Path, tmp_path: Path) -> None:
    push_folder(finished, ADAPTER, token=TOKEN)
    program = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({ADAPTER!r}, **eval(sys.argv[1]))\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r}); print(type(model).__name__)"
    )
    environment = client_environment(
        server, tmp_path / "home", TOKEN, HF_HUB_DISABLE_XET="1", PYTHONPATH=str(Path(__file__).parents[1])
    )

    def run(options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", program, options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    assert "trust_remote_code" in run("{}").stderr
    trusted = run("{'trust_remote_code': True}")
    assert trusted.stdout.strip().splitlines()[-1:] == ["PTuneForCausalLM"], trusted.stderr[-2000:]
    assert {p.suffix for p in (tmp_path / "again").iterdir()} == {".json", ".safetensors"}  # no copy of our source


def test_a_card_names_the_repository_that_it_is_pushed_to(
    server: HubServer, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_repository(model, tmp_path / "topic", "topic", tokenizer=words())
    before = (folder / "README.md").read_text()
    assert 'model="topic"' in before and main(["push", str(folder), ADAPTER]) == 0
    text = server.repos[ADAPTER].at().files["README.md"].content.decode()
    assert f'model="{ADAPTER}"' in text and '"topic"' not in text and "\n# adapter\n" in text
    assert (folder / "README.md").read_text() == before and not caplog.text
    (folder / "README.md").write_text(before + "\nBy hand.\n")
    assert main(["push", str(folder), "alice/second"]) == 0
    assert b"By hand." in server.repos["alice/second"].at().files["README.md"].content
    assert "pushed as it is" in caplog.text
    snapshot = huggingface_hub.snapshot_download(ADAPTER, cache_dir=tmp_path / "cache", token=TOKEN)
    assert main(["push", snapshot, "alice/third"]) == 0  # the cache is not written to
    assert b'model="alice/third"' in server.repos["alice/third"].at().files["README.md"].content
    assert (Path(snapshot) / "README.md").read_text() == text


def test_what_a_trainer_wrote_gets_card_and_shim(server: HubServer, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out")
    words().save_pretrained(tmp_path / "out")
    facts = facts_of(model)
    facts.metrics = [{"accuracy": 0.75}]
    facts.save(tmp_path / "out")
    there = sorted((tmp_path / "out").iterdir())
    assert main(["push", str(tmp_path / "out"), ADAPTER]) == 0
    files = server.repos[ADAPTER].at().files
    assert b"| accuracy | 0.7500 |" in files["README.md"].content and "modeling_hf_ptune.py" in files
    assert b"auto_map" in files["config.json"].content and b"bsd-3-clause" in files["README.md"].content
    assert json.loads(files["run_facts.json"].content)["adapter_bytes"] > 0
    assert sorted((tmp_path / "out").iterdir()) == there


@pytest.mark.parametrize(("revision", "steps"), [(None, 2), ("next", 3), ("refs/pr/1", 2)])
def test_the_bar_of_a_push_ends_full(
    server: HubServer, finished: Path, revision: str | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo(ADAPTER)
    repo.open_pull_request("another", "alice")
    bars: list[Any] = []

    def made(**given: Any) -> Any:
        bars.append(tqdm(**given, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(pushing, "tqdm", made)
    server.fail("POST", "/commit/", 503)
    push_folder(finished, ADAPTER, token=TOKEN, revision=revision)
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(steps, steps, "step")]


def test_info_and_card(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((finished / "run_facts.json").read_text()) | {"metrics": [{"accuracy": 0.75}]}
    (finished / "run_facts.json").write_text(json.dumps(facts))
    assert main(["info", str(finished)]) == 0
    told = capsys.readouterr().out
    for expected in ("Prefix Tuning", "alice/base", "virtual tokens: 3, flattened", "accuracy: 0.7500"):
        assert expected in told
    assert main(["card", str(finished), "--repo-id", ADAPTER]) == 0
    assert "| accuracy | 0.7500 |" in (finished / "README.md").read_text()
    assert main(["card", str(finished.parent)]) == 2 and "ModelCardCallback" in capsys.readouterr().err


def test_info_names_the_nearest_tokens(server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = build("llama").float()
    backbone.name_or_path = str(tmp_path / "base")
    model = get_ptune_model(backbone, PTuneConfig(method="prompt_tuning", num_virtual_tokens=2))
    with torch.no_grad():
        model.prompt.weight.copy_(2 * backbone.get_input_embeddings().weight[[7, 42]])
    model.save_pretrained(tmp_path / "prompt")
    assert main(["info", str(tmp_path / "prompt")]) == 0
    told = capsys.readouterr().out
    assert "  0: 'w7' 1.00" in told and "  1: 'w42' 1.00" in told


def test_info_asks_for_no_weights_of_the_base(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    server.repos["alice/base"].private = True
    backbone = build("llama").float()
    backbone.name_or_path = "alice/base"
    model = get_ptune_model(backbone, PTuneConfig(method="prompt_tuning", num_virtual_tokens=2))
    model.save_pretrained(tmp_path / "prompt")
    server.add_repo(ADAPTER, {p.name: p.read_bytes() for p in (tmp_path / "prompt").iterdir()}, private=True)
    options = {"cache_dir": tmp_path / "cache", "token": TOKEN}
    assert "the base's embeddings are not at hand" in describe_adapter(ADAPTER, **options)
    assert not [entry.path for entry in server.log if "/alice/base/" in entry.path and "safetensors" in entry.path]
    AutoModelForCausalLM.from_pretrained("alice/base", **options)
    assert "nearest tokens by cosine:\n  0: " in describe_adapter(ADAPTER, **options)
