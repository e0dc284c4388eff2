"""A Hugging Face Hub for tests: repositories in memory behind the real protocol, with faults on demand."""

from .client import client_environment, connect
from .repository import Blob, Commit, Repo
from .server import Fault, HubServer, LogEntry

__all__ = ["Blob", "Commit", "Fault", "HubServer", "LogEntry", "Repo", "client_environment", "connect"]
