"""Points a client at the server: one in a process of its own, or the one in this process."""

from __future__ import annotations

import os
import re

import pytest
from huggingface_hub import constants

from .server import HubServer


def client_environment(
    server: HubServer, home: str | os.PathLike[str], token: str | None = None, **more: str
) -> dict[str, str]:
    """Environment of a process whose Hub is `server` and whose caches are in `home`; `more` is added to it."""
    ours = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|DATASETS)_.*|.*_PROXY", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return environment | ({"HF_TOKEN": token} if token else {}) | more


def connect(monkeypatch: pytest.MonkeyPatch, server: HubServer, xet: bool = False) -> None:
    """Turn the huggingface_hub of this process to `server` for one test; give it a token and a cache at each call."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
