"""Who may ask, as whom, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class NoAccess(Exception):  # noqa: N818 - named after what it says
    """The request is refused for who sent it."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class Client:
    """A key's holder."""

    sha256: str = ""
    """Of the key, in hexadecimal; the key itself is in no file."""
    tenant: str = ""
    traffic_class: str = ""
    default_priority: int = 0
    best_priority: int = 0
    """The most urgent (smallest) that the holder may ask for."""
    max_requests: int | None = None
    """In the proxy at once, queued or running; None: any number."""

    def priority(self, asked: int | None) -> int:
        """The priority a request gets."""
        wanted = self.default_priority if asked is None else asked
        return max(wanted, self.best_priority)


class Keys:
    """The API keys; without any, everybody is the same anonymous client."""

    def __init__(self, clients: Sequence[Client] = ()) -> None:
        self._clients = tuple(clients)
        self._anonymous = Client(best_priority=-(2**31))
        self._inside: Counter[str] = Counter()

    def client(self, headers: Mapping[str, str]) -> Client:
        """Whose request it is. Raises NoAccess."""
        if not self._clients:
            return self._anonymous
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise NoAccess(401, "give your key: Authorization: Bearer KEY", _CHALLENGE)
        # The header's very bytes: aiohttp decodes what is no UTF-8 to surrogates.
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).hexdigest()
        found = None
        for client in self._clients:  # all of them, so that time tells nothing
            if hmac.compare_digest(client.sha256, digest):
                found = client
        if found is None:
            raise NoAccess(401, "this key is not known", _CHALLENGE)
        return found

    @contextmanager
    def admitted(self, client: Client) -> Iterator[None]:
        """While a request of the client is inside. Raises NoAccess when it has too many."""
        if client.max_requests is None:
            yield
            return
        if self._inside[client.sha256] >= client.max_requests:
            raise NoAccess(429, "too many requests with this key", {"Retry-After": "1"})
        self._inside[client.sha256] += 1
        try:
            yield
        finally:
            self._inside[client.sha256] -= 1

    @property
    def inside(self) -> int:
        """Requests that are inside now, of clients that may have only so many."""
        return self._inside.total()
