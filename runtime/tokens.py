"""How many tokens a request may take, and how its prompt begins: read from the body's fields.

Without a tokenizer, prompt tokens are characters, calibrated by the usage that workers report.
Everything here raises ValueError for a field that no worker would take, worded for the client.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from viisim.errors import InputError

PREFIX_BLOCK_BYTES = 256
MAX_PREFIX_BLOCKS = 512
CHARACTERS_PER_TOKEN = 4.0
"""English prose under the usual tokenizers; replaced by what workers report."""
MAX_TOKENS = 2**31 - 1
MAX_SEQUENCES = 1024

_MEMORY = 0.98
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks to be computed before the first token."""

    data: bytes
    """The text, or the token ids eight bytes each: equal beginnings are equal prefixes."""
    characters: int = 0
    """0 for token ids."""
    ids: int = 0
    """Tokens that are there as such."""
    number: int = 1
    """Prompts in one request, each answered for itself."""
    is_text: bool = True
    """Whether all of it is text, so that characters and tokens may be compared."""

    def block_tokens(self, tokens: int) -> int:
        """How many tokens a block has, of a prompt that has `tokens`."""
        return max(1, round(tokens * PREFIX_BLOCK_BYTES / max(1, len(self.data))))

    def blocks(self) -> tuple[int, ...]:
        """Chained hashes of the whole blocks it begins with."""
        whole = min(len(self.data) // PREFIX_BLOCK_BYTES, MAX_PREFIX_BLOCKS)
        blocks = []
        chain = b""
        for start in range(0, whole * PREFIX_BLOCK_BYTES, PREFIX_BLOCK_BYTES):
            block = self.data[start : start + PREFIX_BLOCK_BYTES]
            chain = hashlib.blake2b(chain + block, digest_size=8).digest()
            blocks.append(int.from_bytes(chain, "little") >> 1)
        return tuple(blocks)


def read_prompt(path: str, fields: Mapping[str, Any]) -> Prompt:
    """The prompt of a request to one of the endpoints that generate."""
    if path == "/v1/chat/completions" or "messages" in fields:
        return _of_messages(fields.get("messages"), "messages")
    name = "prompt" if path == "/v1/completions" else "input"
    content = fields.get(name)
    if isinstance(content, str):
        return _of_text(content)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{name}: required, a text or a list")
    if path == "/v1/responses":
        return _of_messages(content, name)
    if type(content[0]) is int:
        return Prompt(_bytes_of_ids(content, name), ids=len(content), is_text=False)
    if all(isinstance(part, str) for part in content):
        return _of_text("".join(content), len(content))
    if all(isinstance(part, list) for part in content):
        data = b"".join(_bytes_of_ids(part, name) for part in content)
        return Prompt(data, ids=len(data) // 8, number=len(content), is_text=False)
    raise ValueError(f"{name}: a list of texts, of token ids, or of lists of token ids")


def output_tokens(path: str, fields: Mapping[str, Any], prompts: int, default: int) -> int:
    """The most tokens that the answer may have: of all its choices, for all prompts."""
    if path == "/v1/embeddings":
        return prompts
    sequences = max(
        _whole(fields, "n", 1, MAX_SEQUENCES), _whole(fields, "best_of", 1, MAX_SEQUENCES)
    )
    for name in _LIMITS:
        if fields.get(name) is not None:
            default = _whole(fields, name, default, MAX_TOKENS)
            break
    return default * sequences * prompts


class TokenCount(Protocol):
    """How prompt tokens are counted."""

    def tokens(self, prompt: Prompt) -> int:
        """Those of a prompt, at least 1."""

    def observe(self, prompt: Prompt, tokens: int) -> None:
        """A worker counted so many tokens in the prompt."""


class Tokenizer:
    """Prompt tokens by the model's own `tokenizer.json`; what a chat template adds is not in it.

    About 1 ms of the event loop for 1,000 tokens. Raises InputError for a file that is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise InputError(
                "deploy.tokenizer: the package tokenizers is not installed; "
                "pip install 'viisim[tokenizer]', or leave the key out"
            ) from None
        try:
            self._encode = Loaded.from_file(str(path)).encode
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"deploy.tokenizer: {path}: {error}; give a tokenizer.json") from error

    def tokens(self, prompt: Prompt) -> int:
        """See `TokenCount`."""
        if not prompt.characters:
            return max(1, prompt.ids)
        return max(1, len(self._encode(prompt.data.decode(errors="replace")).ids))

    def observe(self, prompt: Prompt, tokens: int) -> None:
        """See `TokenCount`: there is nothing to learn."""


class TokenEstimate:
    """Prompt tokens from characters, corrected by the usage that workers report."""

    def __init__(self) -> None:
        self._characters = CHARACTERS_PER_TOKEN * 100
        self._tokens = 100.0

    def tokens(self, prompt: Prompt) -> int:
        """See `TokenCount`."""
        guess = round(prompt.characters * self._tokens / self._characters)
        return max(1, prompt.ids + guess)

    def observe(self, prompt: Prompt, tokens: int) -> None:
        """A worker counted so many tokens in the prompt; older counts fade."""
        if prompt.is_text and prompt.characters and tokens:
            self._characters = _MEMORY * self._characters + prompt.characters
            self._tokens = _MEMORY * self._tokens + tokens


def _whole(fields: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name}: {_shown(value)} is no whole number from 1 to {most}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _of_text(text: str, number: int = 1, is_text: bool = True) -> Prompt:
    data = text.encode(errors="surrogatepass")
    return Prompt(data, characters=len(text), number=number, is_text=is_text)


def _of_messages(messages: Any, name: str) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}: required, a list of messages")
    parts: list[str] = []
    is_text = True
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"{name}: each is an object with role and content")
        is_text &= _add_message(message, parts)
    return _of_text("".join(parts), is_text=is_text)


def _add_message(message: Mapping[str, Any], parts: list[str]) -> bool:
    """Add what the message says; whether that is all text."""
    parts.append(f"<|{_shown(message.get('role'))}|>")
    content = message.get("content")
    pieces = content if isinstance(content, list) else [content or ""]
    is_text = True
    for piece in pieces:
        text = piece.get("text") if isinstance(piece, dict) else piece
        if isinstance(text, str):
            parts.append(text)
        else:
            # An image is not its base64: it counts as nothing, but images differ.
            is_text = False
            parts.append(_digest(piece))
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    if rest:  # calls of tools and their results
        parts.append(json.dumps(rest))
    return is_text


def _digest(piece: Any) -> str:
    return hashlib.blake2b(json.dumps(piece).encode(), digest_size=8).hexdigest()


def _bytes_of_ids(ids: list[Any], name: str) -> bytes:
    if not ids or not all(type(token) is int and 0 <= token <= MAX_TOKENS for token in ids):
        raise ValueError(f"{name}: token ids are whole numbers from 0 to {MAX_TOKENS}")
    return b"".join(token.to_bytes(8, "little") for token in ids)
