"""The server as a web application: `app` builds it, `run` listens.

gate.py      before every route: keys, sizes, slowness, ids    refusals.py  errors as codes and bodies
asking.py    ask, watch whether somebody waits, stream         answers.py   OpenAI's words for answers
openai.py    /v1/models, completions, chats                    lorax.py     /generate, /generate_stream
owner.py     /admin, and vLLM's load and unload                ops.py       /health, /ready, /metrics, feedback
page.py      /docs
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from lorakit import __version__
from lorakit.core.lazy import need
from lorakit.errors import LorakitError, ServingError
from lorakit.serving.http.gate import Bounds, Gate
from lorakit.serving.http.lorax import add_lorax
from lorakit.serving.http.openai import add_models, add_openai
from lorakit.serving.http.ops import add_ops
from lorakit.serving.http.owner import add_aliases, add_owner, add_vllm
from lorakit.serving.http.page import add_page
from lorakit.serving.http.refusals import body, of_faults, refusal
from lorakit.serving.keys import Keys
from lorakit.serving.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Bounds", "app", "refuse_open", "run"]

_HERE = ("127.0.0.1", "::1", "localhost")
_GRACE = 30  # seconds
_log = logging.getLogger("lorakit.serving")


def app(service: Service, keys: Keys | None = None, bounds: Bounds | None = None) -> FastAPI:
    """Return the web application of a service; it answers no browser of another origin.

    Args:
        service: what answers.
        keys: who may ask; without, everybody may do everything, so `run` listens to this machine alone.
        bounds: what one client may take.

    Raises:
        MissingExtraError: FastAPI is not installed.
    """
    need("fastapi", "serve")
    from fastapi import FastAPI

    made = FastAPI(title="lorakit", version=__version__, docs_url=None, redoc_url=None, lifespan=_closing(service))
    _add_errors(made)
    for add in (add_openai, add_models, add_lorax, add_vllm, add_owner, add_aliases, add_ops):
        add(made, service)
    add_page(made)
    made.state.keys, made.state.service = keys if keys is not None else Keys(), service
    made.add_middleware(Gate, keys=made.state.keys, metrics=service.metrics, bounds=bounds or Bounds())
    return made


def run(
    application: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Keys | None = None,
    most_connections: int = 1000,
    ready: Callable[[int, Callable[[], None]], None] | None = None,
) -> None:
    """Listen until the process is told to end, then finish the answers under way, for 30 seconds at most.

    Told a second time it ends them at once; whoever is not answered gets 503.

    Args:
        application: from `app`.
        host: the address to listen at.
        port: 0 takes a free one.
        keys: those of the application; where it has none, no address but this machine's own is taken.
        most_connections: more get 503 at once.
        ready: called once connections are taken, with the port and a function that ends it all from any thread.

    Raises:
        ServingError: an address that others reach, without keys, or one that cannot be listened at.
    """
    assert keys is None or keys is application.state.keys, "the application was made with other keys"
    refuse_open(host, application.state.keys)
    uvicorn = need("uvicorn", "serve")
    config = uvicorn.Config(application, host=host, port=port, log_level="warning", server_header=False, ws="none",
                            limit_concurrency=most_connections, timeout_keep_alive=15,
                            timeout_graceful_shutdown=_GRACE + 5)  # fmt: skip
    try:
        _server(config, ready, application.state.service).run()
    except SystemExit as failed:  # how uvicorn says that it cannot listen; its log says why
        if failed.code:
            raise ServingError(f"cannot listen at {host}:{port}, which may be taken; choose another port") from None


def refuse_open(host: str, keys: Keys | None) -> None:
    """Raise `ServingError` where others could reach a server that asks for no key."""
    if host not in _HERE and (keys is None or keys.open):
        raise ServingError(
            f"{host} can be reached by others and no keys were given; listen at 127.0.0.1, or give keys (--keys)"
        )


def _server(config: Any, ready: Callable[[int, Callable[[], None]], None] | None, service: Service) -> Any:
    """Return uvicorn's server, one that says when it takes connections, and that answers whom it cuts off."""
    uvicorn = need("uvicorn", "serve")

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        hurried = False

        async def startup(self, sockets: Any = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)
            if self.started and ready is not None:
                ready(self.servers[0].sockets[0].getsockname()[1], self.stop)

        def stop(self) -> None:
            self.should_exit = True

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit and not self.hurried:  # a third time uvicorn drops everything
                self.hurried = True
                self.loop.call_soon_threadsafe(service.close)
            else:
                super().handle_exit(sig, frame)

        async def shutdown(self, sockets: Any = None) -> None:
            late = asyncio.get_running_loop().call_later(_GRACE, service.close)
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

    return Server(config)


def _closing(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    return lifespan


def _add_errors(made: FastAPI) -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, LorakitError)
        code, told, headers = refusal(error, request.url.path)
        if code >= 500:
            _log.error("%s: %s", request.state.visit.id, error)
        return JSONResponse(told, code, headers)

    async def faults(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(of_faults(error.errors()), 400)

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}: {str(error.detail)[:200]}; /docs lists the routes"
        return JSONResponse(body(error.status_code, what, "not_found" if error.status_code == 404 else "http"),
                            error.status_code, error.headers)  # fmt: skip

    made.add_exception_handler(LorakitError, ours)
    made.add_exception_handler(RequestValidationError, faults)
    made.add_exception_handler(HTTPException, plain)
