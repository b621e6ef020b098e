"""Replies to requests that cannot be read: HTTP 400 with the reason, and without paths of this machine."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from sglang_auf.hooks.intake import FAULTS

ROUTES = "/sglang/srt/entrypoints/http_server.py"
logger = logging.getLogger(__name__)


def add_replies(app: FastAPI) -> None:
    """Put them in front of SGLang's own handler, which keeps the form of a refusal for each route."""
    as_sglang_has_it = app.exception_handlers[RequestValidationError]

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The text of FastAPI's own error names the file and the line of the route's function.
        reply: Any = as_sglang_has_it(request, RequestValidationError(error.errors()))
        return await reply  # type: ignore[no-any-return]

    async def fault(request: Request, error: Exception) -> Response:
        # A ValueError is SGLang's word for a fault of the client, which some of its routes do not catch.
        if not isinstance(error, ValueError) and not _while_reading(error):
            raise error
        logger.warning("%s %s is refused", request.method, request.url.path, exc_info=error)
        reason = f"a field has a wrong form or value ({type(error).__name__}: {error})"
        return await invalid(
            request, RequestValidationError([{"loc": ("body",), "msg": reason, "type": "value_error"}])
        )

    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    for kind in (ValueError, *FAULTS):
        app.add_exception_handler(kind, fault)


def _while_reading(error: Exception) -> bool:
    """Whether it was raised while a request was taken apart: by FastAPI for a route's arguments (some validators of
    SGLang's models break on other types), or by the route's own function (/vertex_generate looks into a dictionary).
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "solve_dependencies" for frame in frames) or frames[-1].filename.endswith(ROUTES)
