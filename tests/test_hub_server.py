"""The Hub that other tests talk to, met through the unmodified client."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Blob, HubServer, client_environment, connect
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 40

ROUND_TRIP = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes))
commit = model.push_to_hub("alice/tiny", private=True)
assert model.push_to_hub("alice/tiny").oid == commit.oid
loaded = AutoModelForCausalLM.from_pretrained("alice/tiny", revision=commit.oid)
ours, theirs = model.state_dict(), loaded.state_dict()
assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
try:
    AutoConfig.from_pretrained("alice/tiny", token=False, cache_dir=sys.argv[1])
except OSError as error:
    print(type(error.__cause__).__name__)
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with two users, and a client in this process that is online, without xet."""
    with HubServer() as server:
        server.add_user("alice", "alice-writes")
        server.add_user("alice", "alice-reads", write=False)
        server.add_user("bob", "bob-writes")
        connect(monkeypatch, server)
        yield server


@pytest.fixture
def alice(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token="alice-writes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "more").mkdir(parents=True)
    (path / "README.md").write_text("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# A card\n")
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    (path / "more" / "tömlö.txt").write_text("text")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("storage", ["lfs", "regular"])
def test_a_folder_comes_back_as_it_was_uploaded(
    hub: HubServer, alice: HfApi, folder: Path, tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.regular_only = storage == "regular"
    connect(monkeypatch, hub, xet=hub.regular_only)
    assert alice.create_repo("alice/model") == f"{hub.url}/alice/model"
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("alice/model")
    assert alice.create_repo("alice/model", exist_ok=True).repo_id == "alice/model"
    repo = hub.repos["alice/model"]

    commit = alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert repo.at("main").id == commit.oid and len(repo.commits) == 2
    assert repo.at("main").files["model.safetensors"].lfs is (storage == "lfs")
    assert bool(hub.requests("PUT", "/storage/")) is (storage == "lfs")
    assert alice.upload_folder(repo_id="alice/model", folder_path=folder).oid == commit.oid
    assert len(repo.commits) == 2

    snapshot = Path(alice.snapshot_download("alice/model", cache_dir=tmp_path / "cache"))
    assert snapshot.name == commit.oid
    assert {name: data for name, data in contents(snapshot).items() if name != ".gitattributes"} == contents(folder)
    one = alice.hf_hub_download("alice/model", "model.safetensors", cache_dir=tmp_path / "other")
    assert Path(one).resolve().read_bytes() == WEIGHTS
    assert Path(one).resolve().name == repo.at("main").files["model.safetensors"].etag

    info = alice.model_info("alice/model", files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert (info.library_name, info.pipeline_tag, sizes["model.safetensors"]) == (
        "transformers",
        "text-generation",
        len(WEIGHTS),
    )
    assert sorted(entry.path for entry in alice.list_repo_tree("alice/model")) == sorted(
        [".gitattributes", "README.md", "config.json", "model.safetensors", "more"]
    )
    assert [entry.path for entry in alice.list_repo_tree("alice/model", "more")] == ["more/tömlö.txt"]
    assert alice.get_paths_info("alice/model", ["more", "config.json", "no"])[0].path == "config.json"


def test_revisions(hub: HubServer, alice: HfApi, tmp_path: Path) -> None:
    repo = hub.add_repo("alice/model", {"a.txt": b"one", "old/b.txt": b"b"})
    first = repo.at("main").id
    alice.create_branch("alice/model", branch="next/one")
    alice.create_tag("alice/model", tag="v1")
    second = alice.upload_file(
        path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="alice/model", revision="next/one", parent_commit=first
    ).oid
    assert (repo.at("main").id, repo.at("v1").id, repo.at("next/one").id) == (first, first, second)
    for revision, content in [("main", b"one"), ("v1", b"one"), ("next/one", b"two"), (second, b"two")]:
        path = alice.hf_hub_download("alice/model", "a.txt", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content
    assert [commit.commit_id for commit in alice.list_repo_commits("alice/model", revision="next/one")][:2] == [
        second,
        first,
    ]
    assert {branch.name for branch in alice.list_repo_refs("alice/model").branches} == {"main", "next/one"}

    with pytest.raises(HfHubHTTPError, match="412"):
        alice.upload_file(
            path_or_fileobj=b"3", path_in_repo="a", repo_id="alice/model", revision="next/one", parent_commit=first
        )
    alice.delete_folder("old", "alice/model")
    assert list(repo.at("main").files) == [".gitattributes", "a.txt"] and len(repo.commits) == 4
    with pytest.raises(RevisionNotFoundError):
        alice.hf_hub_download("alice/model", "a.txt", revision="no", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        alice.hf_hub_download("alice/model", "no.txt", cache_dir=tmp_path)
    alice.delete_branch("alice/model", branch="next/one")
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/model", revision="next/one")
    alice.delete_repo("alice/model")
    assert not hub.repos


def test_a_dataset_has_a_name_of_its_own(hub: HubServer, alice: HfApi, tmp_path: Path) -> None:
    hub.add_repo("alice/same", {"a.bin": b"model"})
    assert alice.create_repo("alice/same", repo_type="dataset") == f"{hub.url}/datasets/alice/same"
    where = {"repo_id": "alice/same", "repo_type": "dataset"}
    alice.upload_file(path_or_fileobj=b"data", path_in_repo="a.bin", **where)
    path = alice.hf_hub_download(**where, filename="a.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == hub.repos["datasets/alice/same"].at().files["a.bin"].content == b"data"
    assert hub.repos["alice/same"].at().files["a.bin"].content == b"model"


def test_who_may_do_what(hub: HubServer, alice: HfApi, tmp_path: Path) -> None:
    reader = HfApi(endpoint=hub.url, token="alice-reads")
    bob, nobody = HfApi(endpoint=hub.url, token="bob-writes"), HfApi(endpoint=hub.url, token=False)
    assert (alice.whoami()["name"], reader.whoami()["auth"]["accessToken"]["role"]) == ("alice", "read")
    alice.create_repo("alice/secret", private=True)
    private = hub.repos["alice/secret"]
    assert reader.model_info("alice/secret").private
    for api in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("alice/secret")
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("alice/secret", ".gitattributes", cache_dir=tmp_path)
    private.readers.add("bob")
    assert Path(bob.hf_hub_download("alice/secret", ".gitattributes", cache_dir=tmp_path)).exists()

    public = hub.add_repo("alice/open", {"a.txt": b"a"})
    for api, status in [(reader, 403), (bob, 403), (nobody, 401)]:
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="alice/open")
        assert caught.value.response.status_code == status
    assert len(public.commits) == 2
    with pytest.raises(HfHubHTTPError, match="401") as caught:
        HfApi(endpoint=hub.url, token="unknown").model_info("alice/open")
    assert not isinstance(caught.value, RepositoryNotFoundError)

    alice.update_repo_settings("alice/open", gated="auto")
    for api in (bob, nobody):
        assert api.model_info("alice/open").gated == "auto"
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("alice/open", "a.txt", cache_dir=tmp_path)
    public.readers.add("bob")
    assert Path(bob.hf_hub_download("alice/open", "a.txt", cache_dir=tmp_path)).read_bytes() == b"a"


def test_faults_of_downloads(hub: HubServer, alice: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)  # what a dropped download keeps are whole chunks
    repo = hub.add_repo("alice/model", {"model.safetensors": Blob(WEIGHTS, lfs=True)})

    def download(cache: str) -> bytes:
        return Path(alice.hf_hub_download("alice/model", "model.safetensors", cache_dir=tmp_path / cache)).read_bytes()

    hub.fail("GET", "model.safetensors", "truncate", at=1000)
    assert download("resumed") == WEIGHTS
    assert [entry.status for entry in hub.requests("GET", "model.safetensors")] == [200, 206]
    hub.fail("GET", "model.safetensors", 429, retry_after=0)
    assert download("limited") == WEIGHTS
    for kind, message in [("reset", "reset"), ("reset_in_body", "reset"), (500, "500")]:
        hub.fail("GET", "model.safetensors", kind)
        with pytest.raises(Exception, match=message):
            download("failed")
    fault = hub.fail("GET", "model.safetensors", "corrupt", at=7)
    damaged = download("corrupted")  # accepted by the client: whoever must know compares the sha256 of the listing
    assert fault.hits == 1 and [i for i in range(len(WEIGHTS)) if damaged[i] != WEIGHTS[i]] == [7]
    assert hashlib.sha256(damaged).hexdigest() != repo.at("main").files["model.safetensors"].sha256

    late = hub.fail("GET", "/api/models/", "delay", times=None, skip=1, seconds=0.3)
    start = time.monotonic()
    alice.model_info("alice/model")
    assert time.monotonic() - start < 0.3 and late.hits == 0
    alice.model_info("alice/model")
    assert time.monotonic() - start >= 0.3 and late.hits == 1
    hub.clear_faults()
    alice.model_info("alice/model")
    assert late.hits == 1


def test_faults_of_uploads(hub: HubServer, alice: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.add_repo("alice/model")
    hub.fail("PUT", "/storage/", "reset")
    hub.fail("PUT", "/storage/", 503)
    hub.fail("POST", "/commit/", 503)
    with pytest.raises(HfHubHTTPError, match="503"):
        alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert [entry.status for entry in hub.requests("PUT", "/storage/")] == [None, 503, 200] and len(repo.commits) == 1

    hub.fail("POST", "/commit/", "lose_response")
    with pytest.raises(Exception, match="reset"):
        alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert repo.at("main").files["model.safetensors"].content == WEIGHTS and len(repo.commits) == 2
    assert alice.upload_folder(repo_id="alice/model", folder_path=folder).oid == repo.at("main").id
    assert len(repo.commits) == 2

    hub.regular_only = True
    connect(monkeypatch, hub, xet=True)
    (folder / "config.json").write_text('{"a": 1}')
    hub.fail("POST", "/commit/", "lose_response")
    alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(repo.commits) == 4  # with xet on the client sends a commit again, and both were applied


@pytest.mark.parametrize("storage", ["lfs", "regular"])
def test_a_model_is_pushed_and_loaded(tmp_path: Path, storage: str) -> None:
    with HubServer(regular_only=storage == "regular") as hub:
        hub.add_user("alice", "alice-writes")
        xet = {"HF_HUB_DISABLE_XET": "1"} if storage == "lfs" else {}
        environment = client_environment(hub, tmp_path / "home", "alice-writes", **xet)
        command = [sys.executable, "-c", ROUND_TRIP, str(tmp_path / "other")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1:] == ["RepositoryNotFoundError"]  # deepspeed logs there too
        repo = hub.repos["alice/tiny"]
        assert repo.private and len(repo.commits) == 2
        assert repo.at("main").files["model.safetensors"].lfs is (storage == "lfs")
        assert hub.requests("GET", "/alice/tiny/resolve/")
