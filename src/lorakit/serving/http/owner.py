"""The owner's routes: adapters, aliases, feedback and draining, and the two by which vLLM loads and unloads adapters.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import AdapterFileError, UnknownAdapterError
from lorakit.serving.http.schemas import AddRequest, AliasRequest, LoadRequest, UnloadRequest
from lorakit.serving.service import Service
from lorakit.serving.shelf.manifest import Manifest
from lorakit.serving.shelf.registry import Registry

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_owner(app: "FastAPI", service: Service) -> None:
    """Add the routes under /admin, but for those of aliases."""
    registry = service.registry

    @app.get("/admin/adapters", tags=["Owner"])
    async def adapters() -> Any:
        """List every model with its digest, its arms and whether it is loaded, and what the adapters take."""
        models, usage = await service.aside(registry.models), await service.aside(registry.usage)
        return {"models": [asdict(model) for model in models], "usage": asdict(usage)}

    @app.put("/admin/adapters/{name:path}", tags=["Owner"])
    async def add(name: str, body: AddRequest) -> Any:
        """Serve the adapter in a folder of this machine; the folder must lie where the server takes adapters from."""
        return await service.aside(_added, registry, name, body)

    @app.delete("/admin/adapters/{name:path}", tags=["Owner"])
    async def remove(name: str) -> Any:
        """Serve an adapter no longer; those who are being answered get their answer."""
        await service.aside(registry.remove, name)
        return {"removed": name}

    @app.post("/admin/prune", tags=["Owner"])
    async def prune() -> Any:
        """Delete the files of adapters that no name or alias can be turned to any more."""
        gone = await service.aside(registry.prune)
        return {"removed": [one.digest for one in gone], "bytes": sum(one.bytes for one in gone)}

    @app.post("/admin/drain", tags=["Owner"])
    async def drain() -> Any:
        """Take no new request, and finish those that are being answered."""
        service.drain()
        return {"draining": True, "open": service.open}


def add_aliases(app: "FastAPI", service: Service) -> None:
    """Add the routes under /admin/aliases."""
    registry = service.registry

    @app.put("/admin/aliases/{alias:path}", tags=["Owner"])
    async def point(alias: str, body: AliasRequest) -> Any:
        """Turn an alias to an adapter, or share it out between several by weight."""
        target = body.target if body.target is not None else body.weights
        await service.aside(registry.point, alias, target)
        return {"alias": alias, "target": target}

    @app.delete("/admin/aliases/{alias:path}", tags=["Owner"])
    async def forget(alias: str) -> Any:
        """Forget an alias; what it pointed to stays."""
        await service.aside(registry.remove, alias)
        return {"removed": alias}

    @app.post("/admin/aliases/{alias:path}/rollback", tags=["Owner"])
    async def rollback(alias: str) -> Any:
        """Turn an alias, or a name, back to its target before this one."""
        return {"alias": alias, "target": await service.aside(registry.rollback, alias)}


def add_vllm(app: "FastAPI", service: Service) -> None:
    """Add vLLM's routes, with its payloads, texts and codes; only what it answers with 500 has a code of its own."""
    from fastapi.responses import JSONResponse, PlainTextResponse, Response

    def refused(code: int, kind: str, message: str) -> Response:
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, code)

    @app.post("/v1/load_lora_adapter", tags=["vLLM"])
    async def load(body: LoadRequest) -> Response:
        """Serve the adapter in a folder of this machine under a name."""
        name, folder = body.lora_name, body.lora_path
        if not name or not folder:
            return refused(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name in service.registry.names.pointers() and not body.load_inplace:
            return refused(400, "InvalidUserInput",
                           f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                           "place, set 'load_inplace' to True.")  # fmt: skip
        try:
            await service.aside(_added, service.registry, name, AddRequest(path=folder, replace=body.load_inplace))
        except AdapterFileError:
            if not Path(folder).exists():  # inside the folders that adapters come from, else it was refused before
                return refused(404, "NotFoundError", f"Loading lora '{name}' failed: No adapter found for '{folder}'")
            raise
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", tags=["vLLM"])
    async def unload(body: UnloadRequest) -> Response:
        """Serve an adapter no longer."""
        if not body.lora_name:
            return refused(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await service.aside(service.registry.remove, body.lora_name)
        except UnknownAdapterError:
            return refused(404, "NotFoundError", f"The lora adapter '{body.lora_name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _added(registry: Registry, name: str, body: AddRequest) -> dict[str, Any]:
    made: Manifest = registry.add(name, Path(body.path), replace=body.replace)
    if body.pin is not None:
        (registry.pin if body.pin else registry.unpin)(name)
    told = {"digest": made.digest, "bytes": made.bytes, "method": made.method, "rank": made.rank}
    return {"name": name, **told, "parameters": made.parameters, "pinned": registry.pinned(name)}
