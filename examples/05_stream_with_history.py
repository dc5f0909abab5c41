"""Two questions over HTTP, each answer as it comes. The second one needs the first.

    make serve                                           # in another terminal
    python examples/05_stream_with_history.py [URL]      # default: http://127.0.0.1:8000

The server keeps no conversation: a client sends all of it with every question. What the server has
computed of it before, the picture included, it finds again by its content.
"""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def stream(messages: list[dict]) -> Iterator[str]:
    """The answer's pieces, from server-sent events."""
    body = {"model": "demo", "messages": messages, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return
            if line:  # an empty one ends each event
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(event["error"]["message"])
                yield event["choices"][0]["delta"].get("content", "")


def chat(messages: list[dict], content: str | list[dict]) -> list[dict]:
    """Asks and prints the answer as it comes; the conversation with both."""
    messages = [*messages, {"role": "user", "content": content}]
    answer = ""
    for piece in stream(messages):
        print(piece, end="", flush=True)
        answer += piece
    print()
    return [*messages, {"role": "assistant", "content": answer}]


picture = base64.b64encode(Path(__file__).with_name("shapes.png").read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
history = chat([], [image, {"type": "text", "text": "What is in the picture?"}])
chat(history, "How many of them are red?")
