"""/docs: every route on one page, made from the OpenAPI schema. It runs no script and loads nothing from anywhere.

Its annotations are values, not strings, because FastAPI reads those of routes, and finds local imports no other way.
"""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd; }
summary { cursor: pointer; padding: .3rem 0; }
code { font: 13px ui-monospace, monospace; }
b code { display: inline-block; min-width: 4rem; color: #06c; }
table { border-collapse: collapse; margin: .3rem 0 1rem 1.2rem; }
td { padding: .15rem 1rem .15rem 0; vertical-align: top; border-bottom: 1px solid #eee; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } b code { color: #6bf; } }
"""
_INTRODUCTION = (
    "Send JSON; with keys, the header <code>authorization: Bearer KEY</code>. The schema for programs is "
    '<a href="openapi.json">openapi.json</a>. A route shows what it takes when it is opened.'
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
_NO_BOUND = 2**31 - 1  # what a machine's integers hold bounds nobody


def add_page(app: "FastAPI") -> None:
    """Add /docs."""
    from fastapi.responses import HTMLResponse

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"content-security-policy": _POLICY})


def page(schema: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI schema, its routes under their tags."""
    of: dict[str, list[str]] = {}
    for path, ways in schema["paths"].items():
        for method, route in ways.items():
            of.setdefault(route.get("tags", ["Others"])[0], []).append(_route(method, path, route, schema))
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    parts = "".join(f"<h2>{escape(tag)}</h2>{''.join(routes)}" for tag, routes in of.items())
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{_INTRODUCTION}</p>{parts}</body></html>"
    )


def _route(method: str, path: str, route: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    taken = [
        (one["name"], f"{_kind(one['schema'], schema)}, in the {one['in']}") for one in route.get("parameters", ())
    ]
    for content in route.get("requestBody", {}).get("content", {}).values():
        taken += _fields(content["schema"], schema)
    rows = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td></tr>" for name, kind in taken)
    head = f"<b><code>{method.upper()}</code></b> <code>{escape(path)}</code> {escape(route.get('description', ''))}"
    return f"<details><summary>{head}</summary><table>{rows or '<tr><td>It takes nothing.</td></tr>'}</table></details>"


def _fields(of: Mapping[str, Any], schema: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield each field of an object, and of the objects in it, with what it may be."""
    body = _resolved(of, schema)
    for name, field in body.get("properties", {}).items():
        if "$ref" in field:
            yield from _fields(field, schema, f"{before}{name}.")
        else:
            needed = ", needed" if name in body.get("required", ()) else ""
            yield before + name, _kind(field, schema) + needed


def _resolved(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = field.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"][name] if name else field


def _kind(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return what a value may be, in words: `number from 0 to 2, 1.0 unless told`."""
    if either := [one for one in field.get("anyOf", ()) if one.get("type") != "null"]:
        kind = " or ".join(_kind(one, schema) for one in either)
    elif "items" in field:
        kind = f"list of {_kind(field['items'], schema)}"
    elif "$ref" in field:
        kind = f"object of {', '.join(_resolved(field, schema).get('properties', {}))}"
    else:
        kind = " or ".join(map(json.dumps, field.get("enum", ()))) or field.get("type", "anything")
        bounds = {"from": field.get("minimum"), "above": field.get("exclusiveMinimum"), "to": field.get("maximum")}
        kind += "".join(f" {word} {n:g}" for word, n in bounds.items() if n is not None and abs(n) < _NO_BOUND)
    return kind + (f", {json.dumps(field['default'])} unless told" if field.get("default") else "")
