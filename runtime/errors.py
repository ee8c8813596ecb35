"""Errors as the OpenAI API words them: ours, aiohttp's, and those of requests that never parsed."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from policies.interface import PolicyError
from runtime.access import NoAccess

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}


class ApiError(Exception):
    """Becomes an OpenAI error answer."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def error_body(status: int, message: str) -> bytes:
    """An error as the OpenAI API words it."""
    kind = _TYPES.get(status, "server_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return json.dumps(body).encode()


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """An error as the OpenAI API words it, as an answer."""
    body = error_body(status, message)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as OpenAI error JSON, ours in the log and without a traceback outside."""
    try:
        return await handler(request)
    except (ApiError, NoAccess) as error:
        return error_response(error.status, str(error), error.headers)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        message = f"{request.method} {request.path[:200]}: {error.reason}"
        return error_response(error.status, message, allowed)
    except ConnectionError:
        raise
    except PolicyError as error:  # it ends the driver, which says so
        log.error("%s", error)
        return error_response(500, "internal error")
    except Exception:
        log.exception("%s %s", request.method, request.path)
        return error_response(500, "internal error")
