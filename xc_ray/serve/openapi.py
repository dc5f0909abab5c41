"""What the OpenAPI document says beside what FastAPI finds out by itself."""

from typing import Any, Final

from xc_ray.serve.answers import ErrorBody
from xc_ray.serve.protocol import ChatCompletionRequest

_MEANINGS: Final = {
    400: "The request cannot be served as it is",
    401: "No key, or none of this server's",
    403: "The key may not do this",
    404: "No such model or route",
    408: "The body, or the answer, took too long",
    413: "The body is too large",
    429: "Try again later, after Retry-After seconds",
    500: "The server failed",
    503: "No replica; it is safe to try again",
}


def chat_body() -> dict[str, Any]:
    """`requestBody` of a chat: the body is read and checked by hand, so that it is told by hand."""
    schema = ChatCompletionRequest.model_json_schema()
    # References would be looked up in the whole document.
    content = {"application/json": {"schema": _inlined(schema, schema.get("$defs", {}))}}
    return {"required": True, "content": content}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may fail with these."""
    return {s: {"model": ErrorBody, "description": _MEANINGS[s]} for s in statuses}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in node.items() if name != "$defs"}
