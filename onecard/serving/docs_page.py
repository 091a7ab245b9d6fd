"""The page /docs: the calls and their parameters, drawn from the OpenAPI document.

FastAPI's own page loads a program from a CDN, which a machine without a network cannot do and which would
tell the CDN who works with this server. This page loads nothing.
"""

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
code,pre{background:#eee}pre{padding:.5em;overflow:auto}
td,th{text-align:left;vertical-align:top;padding:.1em 1em .1em 0}"""
HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


def page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document."""
    title = html.escape(document["info"]["title"])
    parts = [f"<h1>{title}</h1>", '<p>The same as a document: <a href="/openapi.json">/openapi.json</a></p>']
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            parts += _call(document, f"{method.upper()} {path}", call)
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    )
    return head + "\n".join(parts)


def _call(document: Mapping[str, Any], name: str, call: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{html.escape(name)}</code></h2>"
    yield f"<p>{html.escape(call.get('description', call.get('summary', '')))}</p>"
    content = call.get("requestBody", {}).get("content", {}).get("application/json")
    if content:
        schema = _resolved(document, content["schema"])
        needed = schema.get("required", [])
        yield "<table><tr><th>parameter<th>type<th>"
        for field, what in schema.get("properties", {}).items():
            mark = "needed" if field in needed else ""
            kind = html.escape(_kind(document, what))
            yield f"<tr><td><code>{html.escape(field)}</code><td>{kind}<td>{mark}"
        yield "</table>"
        if example := schema.get("example"):
            yield f"<pre>{html.escape(json.dumps(example, ensure_ascii=False, indent=1))}</pre>"


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _kind(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A type in words: `integer from 1 to 16`, `list of Message`."""
    if "anyOf" in schema:
        kinds = (_kind(document, each) for each in schema["anyOf"] if each.get("type") != "null")
        return " or ".join(kinds)
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(document, schema.get('items', {}))}"
    limits = [
        f"{word} {schema[name]:.10g}"
        for name, word in (("minimum", "from"), ("maximum", "to"))
        if name in schema
    ]
    return " ".join([str(schema.get("type", "any")), *limits])
