"""Kinds of inference servers that run already: what each is asked for, and what it cannot do.

All of them speak the OpenAI API, each with its own accent. An `Adapter` describes one kind: it
holds no state and does no I/O; `runtime.http_worker` asks and `runtime.reply` judges answers.

Aborts need no description: every one of them frees a request whose client hangs up, at the next
token it would have sent. vLLM: `with_cancellation`, vllm/entrypoints/utils.py. TGI: a response
channel without a receiver, backends/v3/src/backend.rs and queue.rs. MLC-LLM: `ErrorCleanupScope`,
python/mlc_llm/serve/engine.py, and `is_disconnected`, serve/entrypoints/openai_entrypoints.py.
llama.cpp: pull request 18459. Where it is not at once, `notes` say so.

Nor do finish reasons: the last choice of every whole stream has one before `[DONE]`. TGI's
earlier ones have an empty text in `/v1/completions` (`Chunk`, router/src/server.rs), not null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from runtime.metrics_text import VLLM_GAUGES, GaugeNames, read_gauges
from runtime.worker import Reading, WorkerError
from viisim.documents import nearest
from viisim.errors import InputError

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
)
"""What clients of the proxy may ask for."""


def _openai_models(body: Any) -> list[str]:
    """`{"data": [{"id": ...}]}`; llama.cpp adds all `aliases` of its one model."""
    names = [name for card in body["data"] for name in (card["id"], *card.get("aliases", ()))]
    return list(dict.fromkeys(names))


def _tgi_model(body: Any) -> list[str]:
    """`{"model_id": ...}` and much else."""
    return [body["model_id"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One kind of server."""

    name: str
    """In an experiment file."""
    title: str
    """In messages."""
    health_path: str = "/health"
    """Answers 200 when requests are taken, and anything else, or nothing, while loading."""
    models_path: str = "/v1/models"
    models_in: Callable[[Any], list[str]] = _openai_models
    """Names of models out of what `models_path` answers, as JSON."""
    gauges: GaugeNames | None
    """In `/metrics`; None: nothing there is of use."""
    paths: frozenset[str]
    """Those of `PATHS` that it has. What `/tokenize` takes differs from server to server."""
    takes_priority: bool = False
    """A request may have a top-level `priority`, smaller first."""
    takes_ignore_eos: bool = True
    """A request may have a top-level `ignore_eos`: an answer of exactly `max_tokens`."""
    checks_model: bool = True
    """It refuses a request whose `model` it does not serve; otherwise the name means nothing."""
    notes: tuple[str, ...] = ()
    """What else to know, a sentence each."""

    @property
    def cannot(self) -> tuple[str, ...]:
        """What it lacks, a sentence each, for the operator."""
        return (*self._lacks(), *self.notes)

    def _lacks(self) -> Iterator[str]:
        missing = [path for path in PATHS if path not in self.paths]
        if missing:
            yield f"{self.title} has no {', '.join(missing)}."
        if not self.takes_priority:
            yield f"{self.title} knows no priorities: a policy's engine_priority has no effect."
        if self.gauges is None:
            yield f"{self.title} tells no gauges: they stay 0, and their age infinite."
        elif not self.gauges.kv_usage:
            yield f"{self.title} does not tell its KV use: the gauge stays 0."
        if not self.takes_ignore_eos:
            yield f"{self.title} takes no ignore_eos: answers may end before max_tokens."
        if not self.checks_model:
            yield f"{self.title} answers with its own model whatever name a request gives."

    def read(self, text: bytes) -> Reading:
        """Gauges out of `/metrics`. Raises WorkerError when they are missing."""
        if self.gauges is None:
            raise WorkerError(f"{self.title} tells no gauges")
        return read_gauges(text, self.gauges)

    def models(self, content: bytes) -> list[str]:
        """Models out of what `models_path` answered. Raises WorkerError when there are none."""
        try:
            names = self.models_in(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = []
        if not names or not all(isinstance(name, str) for name in names):
            raise WorkerError(f"{self.models_path} names no models, as {self.title} would")
        return names


VLLM = Adapter(
    name="vllm",
    title="vLLM",
    gauges=VLLM_GAUGES,
    paths=frozenset(PATHS),
    takes_priority=True,
)
"""vLLM, docs/serving/openai_compatible_server.md. It answers 400 to any priority unless it was
started with `--scheduling-policy priority`. Errors are `{"error": {"message", "type", "param",
"code"}}` (vllm/entrypoints/utils.py); older versions say `{"object": "error", "message", "code"}`.
"""

TGI = Adapter(
    name="tgi",
    title="Text Generation Inference",
    models_path="/info",
    models_in=_tgi_model,
    gauges=GaugeNames(
        running=("tgi_batch_current_size",), waiting=("tgi_queue_size",), appear_late=True
    ),
    paths=frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize"}),
    takes_ignore_eos=False,
    checks_model=False,
    notes=(
        "Text Generation Inference takes prompts as text only, not as token ids.",
        "Text Generation Inference drops errors from chat streams, even that it is full: keep "
        "what a policy sends below its --max-concurrent-requests.",
    ),
)
"""Hugging Face TGI 2 and 3: routes, `/info` and statuses in router/src/server.rs, error types in
router/src/infer/mod.rs, gauges in docs/source/reference/metrics.md. Errors are `{"error": text,
"error_type": kind}`, also in the stream of `/v1/completions` with status 200: `TGI_STATUSES` has
what the status would have been. 424 is a generation that failed: not the request's fault."""

MLC = Adapter(
    name="mlc",
    title="MLC-LLM",
    health_path="/v1/models",
    gauges=None,
    paths=frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"}),
    takes_ignore_eos=False,
    notes=(
        "MLC-LLM takes one prompt a request, not a list of texts.",
        "MLC-LLM goes on with a prompt that it is processing when its request is aborted.",
    ),
)
"""MLC-LLM: routes in python/mlc_llm/interface/serve.py and serve/entrypoints/. There is no
`/health`, but it listens only once the model is loaded. `/metrics` has sums of times and tokens
(cpp/serve/metrics.cc), and reading it costs the engine a request, so it is not read. `ignore_eos`
exists in `debug_config` only, with `--enable-debug` (protocol/debug_protocol.py); embeddings need
`--embedding-model`. Errors are `{"object": "error", "message", "code"}` as JSON in a JSON text:
serialised twice (protocol/error_protocol.py)."""

LLAMA_CPP = Adapter(
    name="llama.cpp",
    title="llama.cpp server",
    gauges=GaugeNames(
        running=("llamacpp:requests_processing",), waiting=("llamacpp:requests_deferred",)
    ),
    paths=frozenset(PATHS),
    checks_model=False,
    notes=(
        "llama.cpp server tells gauges only when started with --metrics, and embeddings only "
        "with --embeddings.",
        "llama.cpp server reads /metrics between two batches: gauges come late while it "
        "processes long prompts.",
        "llama.cpp server never says that it is full: requests beyond --parallel wait inside it.",
        "llama.cpp server finishes the batch of a prompt before it drops an aborted request.",
    ),
)
"""llama.cpp's llama-server: tools/server/README.md; from September 2025, when errors in streams
became events (pull request 16109). Any path answers 503 `Loading model` while it loads
(tools/server/server-http.cpp). Errors are `{"error": {"code", "message", "type"}}`; 501 says that
a feature was not switched on (`format_error_response`, server-common.cpp)."""

ADAPTERS = {adapter.name: adapter for adapter in (VLLM, TGI, MLC, LLAMA_CPP)}
"""By name."""


def adapter(name: str) -> Adapter:
    """The adapter of that name. Raises InputError for an unknown one."""
    if name not in ADAPTERS:
        raise InputError(f"unknown server {name!r}. {nearest(name, ADAPTERS)}")
    return ADAPTERS[name]


# -- errors, of whichever server --

TGI_STATUSES = {
    "generation": 424,
    "healthcheck": 503,
    "incomplete_generation": 500,
    "missing_template_variable": 422,
    "overloaded": 429,
    "template_error": 422,
    "tool_error": 422,
    "validation": 422,
}
"""By `error_type` (router/src/server.rs, `From<InferError>`)."""
MAX_MESSAGE_CHARACTERS = 200


def error_of(content: bytes) -> tuple[int | None, str]:
    """The status that the body of an error states, None where it states none, and what it says in
    one line."""
    try:
        body = json.loads(content)
        if isinstance(body, str):
            body = json.loads(body)  # MLC-LLM's, serialised twice
        error = body.get("error", body)
        if isinstance(error, dict):
            status, text = error.get("code"), error.get("message", error)
        else:
            status, text = TGI_STATUSES.get(body.get("error_type")), error
    except (ValueError, AttributeError, TypeError, RecursionError):
        status, text = None, content[: 2 * MAX_MESSAGE_CHARACTERS].decode(errors="replace")
    return _status(status), " ".join(str(text).split())[:MAX_MESSAGE_CHARACTERS]


def _status(code: Any) -> int | None:
    """OpenAI's own codes are words, some servers' are numbers in text."""
    try:
        status = int(code)
    except (ValueError, TypeError, OverflowError):
        return None
    return status if 400 <= status < 600 else None
