"""The page for people, and the page of the routes: each one file that loads nothing from elsewhere."""

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment

_FOLDER = files("m2rec.serving.http")


class HtmlPage(NamedTuple):
    """A page, and the content security policy that lets it run its own scripts and styles only."""

    content: str
    policy: str

    @classmethod
    def build(cls, content: str) -> "HtmlPage":
        """A page with the policy of its parts, which are named by their hashes."""
        rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
        rules += ["form-action 'none'", "frame-ancestors 'none'"]
        for tag in ("script", "style"):
            hashes = [_hash_text(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.S)]
            rules.append(" ".join([f"{tag}-src", *(hashes or ["'none'"])]))
        return cls(content, "; ".join(rules))


def _hash_text(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def read_page() -> HtmlPage:
    """The page at `/`."""
    return HtmlPage.build(_FOLDER.joinpath("page.html").read_text(encoding="utf-8"))


def render_api_page(schema: Mapping[str, Any]) -> HtmlPage:
    """A page that lists the routes of an OpenAPI schema, with their parameters and JSON."""
    template = Environment(autoescape=True).from_string(
        _FOLDER.joinpath("api.html.j2").read_text(encoding="utf-8")
    )
    routes = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            answer = route["responses"].get("200", {}).get("content", {}).get("application/json", {})
            routes.append(
                {
                    "method": method.upper(),
                    "path": path,
                    "about": route.get("description", ""),
                    "parameters": route.get("parameters", []),
                    "body": _list_fields(content.get("schema", {}), schema),
                    "answer": _list_fields(answer.get("schema", {}), schema),
                }
            )
    return HtmlPage.build(template.render(info=schema["info"], routes=routes, describe=describe_type))


def _list_fields(reference: Mapping[str, Any], schema: Mapping[str, Any]) -> list[dict[str, str]]:
    """The keys of an object, those of objects in its lists among them."""
    name = reference.get("$ref", "").rpartition("/")[2]
    fields = []
    kind = schema["components"]["schemas"].get(name, {})
    for key, value in kind.get("properties", {}).items():
        needed = "required" if key in kind.get("required", ()) else ""
        about = value.get("description", "")
        fields.append({"key": key, "type": describe_type(value), "needed": needed, "about": about})
        inner = _list_fields(value.get("items", {}), schema)
        fields += [{**field, "key": f"{key}[].{field['key']}"} for field in inner]
    return fields


def describe_type(schema: Mapping[str, Any]) -> str:
    """A type and its bounds, such as `integer, 1 to 1000`."""
    kinds = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    first = kinds[0] if kinds else {}
    name = str(first.get("type", "object"))
    if name == "array":
        name = f"list of {describe_type(first.get('items', {}))}"
    low = first.get("minimum", first.get("minLength", first.get("minItems")))
    high = first.get("maximum", first.get("maxLength", first.get("maxItems")))
    unit = {"string": " characters", "array": " entries"}.get(str(first.get("type")), "")
    if low is not None and high is not None:
        return f"{name}, {low:,} to {high:,}{unit}"
    return f"{name}, at most {high:,}{unit}" if high is not None else name
