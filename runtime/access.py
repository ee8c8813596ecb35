"""Who may ask, as whom, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    rate_per_s: float | None = None
    """Requests in the long run; None: any number."""
    burst: int = 10
    """Requests at once after a pause, before the rate holds."""

    def priority(self, asked: int | None) -> int:
        """The priority a request gets."""
        wanted = self.default_priority if asked is None else asked
        return max(wanted, self.best_priority)


class Keys:
    """The API keys; without any, everybody is the same anonymous client. `clock` gives monotonic
    seconds."""

    def __init__(
        self, clients: Sequence[Client] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._clients = tuple(clients)
        self._anonymous = Client(best_priority=-(2**31))
        self._inside: Counter[str] = Counter()
        self._due_s: dict[str, float] = {}
        """When a client's allowance is whole again."""

    def replace(self, clients: Sequence[Client]) -> None:
        """Take these from now on. From keys to none is no way back: everybody would be let in.

        Raises ValueError.
        """
        if self._clients and not clients:
            raise ValueError("there are keys; they can be replaced but not done without")
        self._clients = tuple(clients)

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
        """While a request of the client is inside. Raises NoAccess when it has too many, or sends
        them too fast."""
        if client.rate_per_s is not None:
            self._take_turn(client, client.rate_per_s)
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

    def _take_turn(self, client: Client, rate_per_s: float) -> None:
        """Hold the client to its rate by the generic cell rate algorithm (ITU-T I.371): each
        request moves the moment at which the allowance is whole by 1 / rate."""
        now_s = self._clock()
        due_s = max(now_s, self._due_s.get(client.sha256, now_s)) + 1 / rate_per_s
        too_early_s = due_s - now_s - client.burst / rate_per_s
        if too_early_s > 1e-9:
            headers = {"Retry-After": str(math.ceil(too_early_s))}
            raise NoAccess(429, "this key's rate is exceeded", headers)
        self._due_s[client.sha256] = due_s

    @property
    def inside(self) -> int:
        """Requests that are inside now, of clients that may have only so many."""
        return self._inside.total()
