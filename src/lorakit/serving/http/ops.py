"""Whether the server lives, whether it is ready, what it did, and how its answers were liked.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from lorakit.serving.http.schemas import FeedbackRequest
from lorakit.serving.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_ops(app: "FastAPI", service: Service) -> None:
    """Add /health, /ready, /metrics, /v1/feedback and its summary."""
    from fastapi import Query
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

    @app.post("/v1/feedback", tags=["Operation"])
    async def rate(body: FeedbackRequest) -> Any:
        """Say how good an answer was, from -1 to 1, by the id of the response."""
        await service.rate(body.response_id, body.rating, body.comment)
        return {"response_id": body.response_id, "rating": body.rating}

    @app.get("/admin/feedback", tags=["Owner"])
    async def feedback(since: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0) -> Any:
        """Tell how each adapter did since a time, in seconds since 1970."""
        rows = [] if service.feedback is None else await service.aside(service.feedback.summary, since)
        return {"since": since, "rows": [asdict(row) for row in rows]}
