"""The page at /docs: the OpenAPI schema to read, without scripts and without anything from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any


def schema_page(schema: dict[str, Any]) -> str:
    """Return an HTML page of a schema's routes and bodies."""
    routes = [
        route_html(method, path, operation, schema)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    title = escape(f"{schema['info']['title']} {schema['info']['version']}: API")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/page/page.css"></head>'
        f'<body class="schema"><main><h1>{title}</h1><p>Also as <a href="/openapi.json">openapi.json</a>. '
        f"Errors have OpenAI's form.</p>{''.join(routes)}</main></body></html>"
    )


def route_html(method: str, path: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return a route: its method, path, summary and the fields of its body."""
    content = operation.get("requestBody", {}).get("content", {})
    bodies = [fields_html(kind, resolve(entry.get("schema", {}), schema), schema) for kind, entry in content.items()]
    summary = escape(operation.get("summary", ""))
    return (
        f"<section><h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{summary}</p>{''.join(bodies)}</section>"
    )


def fields_html(kind: str, body: dict[str, Any], schema: dict[str, Any]) -> str:
    required = body.get("required", [])
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td><code>{escape(type_of(field))}</code></td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in body.get("properties", {}).items()
    ]
    return f"<p>{escape(kind)}; * is required</p><table>{''.join(rows)}</table>"


def resolve(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return what a reference points to."""
    if "$ref" in value:
        return schema["components"]["schemas"][value["$ref"].rpartition("/")[2]]
    return value


def type_of(field: dict[str, Any]) -> str:
    """Return a field's type in few words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(type_of(option) for option in field["anyOf"] if option.get("type") != "null"))
    if "enum" in field:
        return " or ".join(json.dumps(option) for option in field["enum"])
    if field.get("type") == "array":
        return f"list of {type_of(field.get('items', {}))}"
    limits = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([str(field.get("type", "any")), *limits])


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
