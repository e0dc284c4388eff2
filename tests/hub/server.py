"""The server: users, faults, a log of requests, and the connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .messages import HubError, Request, Response, json_response
from .repository import Blob, Repo
from .routes import ROUTES

FaultKind = Literal["reset", "reset_in_body", "lose_response", "truncate", "corrupt", "delay"]


class User(NamedTuple):
    """Who a token speaks for, and whether it may write."""

    name: str
    write: bool


class LogEntry(NamedTuple):
    """One request; the status is None where the client got no answer."""

    method: str
    path: str
    status: int | None


@dataclass
class Fault:
    """A fault waiting for requests of a method whose path holds a string; `hits` counts those that it met."""

    method: str | None
    path: str
    kind: FaultKind | int
    times: int | None
    skip: int
    at: int | None
    retry_after: int | None
    seconds: float
    hits: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Tell whether this request gets the fault, and count it."""
        if self.hits == self.times or self.method not in (None, method) or self.path not in path:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True


class HubServer:
    """A Hub on 127.0.0.1, serving from a thread between `start` and `close` or inside a `with` block."""

    def __init__(self, regular_only: bool = False, lfs_size: int = 10 * 2**20) -> None:
        self.regular_only = regular_only  # preupload answers "regular" for every file: uploads work with xet on
        self.lfs_size = lfs_size  # files from this size on go to LFS whatever their name
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        self.log: list[LogEntry] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.hub = self
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def start(self) -> HubServer:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening and drop every open connection."""
        self.closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_user(self, name: str, token: str, write: bool = True) -> None:
        """Let a token speak for a user; a user may have several."""
        self.users[token] = User(name, write)

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, Blob | bytes] | None = None,
        repo_type: str = "model",
        private: bool = False,
        gated: str | bool = False,
    ) -> Repo:
        """Create a repository without a request."""
        repo = Repo(repo_id, repo_type, private, gated)
        if files:
            repo.commit(files, "Add files")
        self.repos[repo.key] = repo
        return repo

    def fail(
        self,
        method: str | None,
        path: str,
        kind: FaultKind | int,
        *,
        times: int | None = 1,
        skip: int = 0,
        at: int | None = None,
        retry_after: int | None = None,
        seconds: float = 1.0,
    ) -> Fault:
        """Let requests of `method` (None: any) whose path holds `path` fail, `times` (None: always), after `skip`.

        A number is answered instead of doing what was asked. "reset" drops the connection before anything is done,
        "lose_response" after it; "reset_in_body" and "truncate" stop a body at byte `at` (None: half of it) with a
        reset or a plain end; "corrupt" flips one bit of byte `at`; "delay" answers `seconds` later.
        """
        fault = Fault(method, path, kind, times, skip, at, retry_after, seconds)
        with self.lock:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self.lock:
            self._faults.clear()

    def requests(self, method: str | None = None, path: str = "") -> list[LogEntry]:
        """Select from the log."""
        return [entry for entry in list(self.log) if method in (None, entry.method) and path in entry.path]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            return next((fault for fault in self._faults if fault.meets(method, path)), None)

    def answer(self, request: Request) -> Response:
        """Do what a request asks for."""
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, view in ROUTES:
            if route_method == method and (match := pattern.fullmatch(request.path)):
                parts = {name: unquote(part) if part else part for name, part in match.groupdict().items()}
                try:
                    with self.lock:
                        return view(self, request, **parts)
                except HubError as error:
                    return error.response
        return json_response({"error": "Not found"}, 404)

    def user_of(self, request: Request, write: bool = False) -> User | None:
        """Tell who sends a request; with `write`, refuse all but writers."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        user = self.users.get(token)
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and not user.write:
            raise HubError(403, "Forbidden: pass a token with write access")
        return user

    def repo_for(
        self, request: Request, kind: str | None, repo_id: str, write: bool = False, revision: str = "main"
    ) -> Repo:
        """Find a repository that the sender may see; with `write`, change, or whose pull request is the sender's."""
        user = self.user_of(request)
        repo = self.repos.get(repo_id if kind in (None, "models") else f"{kind}/{repo_id}")
        if repo is None or (repo.private and (user is None or user.name not in {repo.owner, *repo.readers})):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        asked = next((pr.author for pr in repo.pull_requests if pr.branch == revision), None)
        if write and self.user_of(request, write=True).name not in (repo.owner, asked):
            raise HubError(403, "Forbidden: only the owner writes to this repository")
        return repo


class _Listener(ThreadingHTTPServer):
    """A thread for each connection; closing drops those that are open."""

    hub: HubServer
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the Hub answer it, and sends the answer or what a fault leaves of it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def handle_request(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        request = Request(self.command, url.path, query, self.headers, self.read_body())
        fault = hub.fault_for(self.command, unquote(url.path))
        kind = fault.kind if fault else None
        if kind == "delay":
            hub.closing.wait(fault.seconds)
        if kind == "reset":
            response = None
        elif isinstance(kind, int):
            response = json_response({"error": f"Fault {kind}"}, kind)
            if fault.retry_after is not None:
                response.headers["Retry-After"] = str(fault.retry_after)
        else:
            response = hub.answer(request)
        if kind == "lose_response":
            response = None
        hub.log.append(LogEntry(self.command, unquote(url.path), response and response.status))
        if response is None:
            self.reset()
        else:
            self.send(response, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, response: Response, fault: Fault | None) -> None:
        body, size = (b"" if self.command == "HEAD" else response.body), len(response.body)
        kind = fault.kind if fault else None
        at = fault.at if fault and fault.at is not None else size // 2
        if kind == "corrupt" and at < len(body):
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        elif kind in ("truncate", "reset_in_body"):
            body = body[:at]
            self.close_connection = True
        self.send_response(response.status)
        for name, value in (response.headers | {"Content-Length": str(size)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if kind == "reset_in_body":
            self.reset()

    def reset(self) -> None:
        """Close the connection so that the client sees a reset, not an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Write nothing: `HubServer.log` holds the requests."""
