"""Requests and answers, apart from how they travel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """A request as the routes see it."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    """An answer before it is sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_response(payload: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(payload).encode(), {"Content-Type": "application/json; charset=utf-8"})


class HubError(Exception):
    """A refusal, with the error code that the client turns into an exception of its own."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: Any):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.response = json_response({"error": message, **body}, status)
        self.response.headers |= {name: value for name, value in headers.items() if value is not None}
