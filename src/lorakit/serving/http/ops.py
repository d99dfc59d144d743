"""Whether the server lives, whether it is ready, what it did, and how its answers were liked.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

from typing import TYPE_CHECKING, Any

from lorakit.serving.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_ops(app: "FastAPI", service: Service) -> None:
    """Add /health, /ready and /metrics."""
    from fastapi.responses import JSONResponse, Response

    @app.get("/health", tags=["Operation"])
    async def health() -> Any:
        """Answer as long as the process does."""
        return {"status": "ok"}

    @app.get("/ready", tags=["Operation"])
    async def ready() -> Response:
        """Say whether to send requests here: 503 until the base is warm, and while the server drains."""
        status = "ready" if service.ready else "draining" if service.draining else "starting"
        return JSONResponse({"status": status, "open": service.open}, 200 if service.ready else 503)

    @app.get("/metrics", tags=["Operation"])
    async def metrics() -> Response:
        """Tell Prometheus what was done."""
        text = await service.aside(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
