"""Errors as HTTP says them: which code each has, in OpenAI's shape, and never a traceback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import (
    AccessError,
    AdapterFileError,
    AttachError,
    BusyError,
    LorakitError,
    RequestError,
    SpecError,
    UnknownAdapterError,
)
from lorakit.serving.answer import Interrupted
from lorakit.serving.service import Draining
from lorakit.serving.shelf.store import StoreError

_CODES: tuple[tuple[type[LorakitError], int, str], ...] = (
    (UnknownAdapterError, 404, "model_not_found"),
    (StoreError, 503, "store_unavailable"),
    (AdapterFileError, 422, "adapter_refused"),
    (SpecError, 422, "adapter_refused"),
    (AttachError, 422, "adapter_refused"),
    (AccessError, 403, "permission_denied"),
    (Draining, 503, "draining"),
    (BusyError, 429, "busy"),
)
_LOST = {"error": (500, "engine_error"), "deadline": (504, "timeout"), "cancelled": (503, "stopped"),
         "slow": (503, "slow_client")}  # fmt: skip
_MOST = 4000
"""Characters of a message; what a template or a file says in it is somebody else's."""
_PROMPTS = {"/v1/chat/completions": "messages", "/generate": "inputs", "/generate_stream": "inputs"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def refusal(error: LorakitError, path: str = "") -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the code, the body and the headers of an error; `path` is the route's, whose words it speaks."""
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, BusyError) else {}
    if isinstance(error, Interrupted):
        code, kind = _LOST[error.why]
    elif isinstance(error, RequestError):
        code, kind = 400, error.code
    else:
        code, kind = next(((code, kind) for of, code, kind in _CODES if isinstance(error, of)), (500, "server_error"))
    param = error.param if isinstance(error, RequestError) else None
    if param == "prompt":
        param = _PROMPTS.get(path, param)
    return code, body(code, str(error), kind, param), headers


def body(code: int, message: str, kind: str | int | None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    family = "server_error" if code >= 500 else _TYPES.get(code, "invalid_request_error")
    message = sendable(message)
    return {"error": {"message": message, "type": family, "param": param, "code": kind}}


def sendable(text: str) -> str:
    """Return a text as a body can hold it: without halves of surrogate pairs, and of readable length."""
    whole = text[:_MOST].encode("utf-8", "backslashreplace").decode()
    return whole if len(text) <= _MOST else f"{whole} ..."


def of_faults(faults: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the error of a request that is not of its schema: the first fault names its parameter, all are told."""
    told: dict[str, tuple[str, str]] = {}
    for fault in faults:
        place = list(fault["loc"])[fault["loc"][:1] in (("body",), ("query",), ("path",)) :]
        ours = fault["type"] in ("unknown_parameter", "unsupported_parameter", "invalid_value")
        if ours:
            where = _dotted([*place, fault["ctx"]["name"]])
            told.setdefault(where, (f"{where} {fault['ctx']['what']}", fault["type"]))
        elif fault["type"] == "json_invalid":
            told.setdefault(
                "", (f"the body is not JSON: {fault.get('ctx', {}).get('error', fault['msg'])}", "not_json")
            )
        else:
            where = _dotted(place)
            what = fault["msg"][:1].lower() + fault["msg"][1:]
            missing = fault["type"] == "missing"
            message = f"{where or 'the body'} {'is missing' if missing else f'is wrong: {what}'}"
            if not where:
                message += "; send one JSON object, with the header content-type: application/json"
            told.setdefault(where, (message, "missing_parameter" if missing else "invalid_value"))
    (param, (_, kind)), *_ = told.items()
    return body(400, "; ".join(message for message, _ in list(told.values())[:8]), kind, param or None)


def _dotted(place: Sequence[str | int]) -> str:
    """Return `messages[0].content` for `("messages", 0, "content")`."""
    joined = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return joined.removeprefix(".")
