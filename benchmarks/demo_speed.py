"""How quick the demo model is once it is served: answers about one small picture, and decoding.

    python benchmarks/demo_speed.py

Starts `serve run serve_config.yaml` and, once it is ready, asks over HTTP about a new small drawn
picture each time (one tile, so that nothing is cached), then lets one stream of `--tokens` tokens
run alone. Prints a table, then one JSON line.
"""

import argparse
import base64
import io
import json
import os
import platform
import statistics
import time
from typing import Any

import httpx
from PIL import Image, ImageDraw
from served import serving_args

COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--num", type=int, default=20, help="pictures after the first one (20)")
    parser.add_argument("--tokens", type=int, default=300, help="of the stream (300)")
    parser.add_argument("--port", type=int, default=8127)
    args = parser.parse_args()
    with serving_args(args.port) as url, httpx.Client(base_url=url, timeout=120) as client:
        seconds = [answer_s(client, number) for number in range(1 + args.num)]
        rate = tokens_per_s(client, args.tokens)
    first, *others = seconds
    figures = {
        "benchmark": "demo_speed",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "first_answer_s": round(first, 2),
        "answer_s": round(statistics.median(others), 3),
        "slowest_answer_s": round(max(others), 3),
        "decode_tokens_per_s": round(rate, 1),
    }
    for name, value in list(figures.items())[2:]:
        print(f"{name:<22} {value:>8}")
    print(json.dumps(figures))


def answer_s(client: httpx.Client, number: int) -> float:
    """Seconds from a request about a picture to the end of its answer, which must be right."""
    colour = COLOURS[number % len(COLOURS)]
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": picture_url(colour, number)}},
        {"type": "text", "text": "What colour is it?"},
    ]
    started = time.monotonic()
    said = post(client, content, max_tokens=16).json()["choices"][0]["message"]["content"]
    seconds = time.monotonic() - started
    if said != f"{colour.capitalize()}.":
        raise SystemExit(f"a {colour} circle is said to be {said!r}")
    return seconds


def tokens_per_s(client: httpx.Client, num: int) -> float:
    """The rate of one stream between its first event and its last."""
    body = request([{"type": "text", "text": "Hello"}], max_tokens=num, ignore_eos=True)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        times, usage = [], 0
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                usage = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", usage)
    return (usage - 1) / (times[-1] - times[0])


def post(client: httpx.Client, content: list[dict[str, Any]], **options: Any) -> httpx.Response:
    """A greedy answer."""
    body = request(content, **options)
    return client.post("/v1/chat/completions", json=body).raise_for_status()


def request(content: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The body of a greedy request."""
    messages = [{"role": "user", "content": content}]
    return {"model": "demo", "messages": messages, "temperature": 0, **options}


def picture_url(colour: str, number: int) -> str:
    """A circle, each time elsewhere."""
    image = Image.new("RGB", (160, 140), "white")
    x, y = 20 + 2 * number, 15 + number
    ImageDraw.Draw(image).ellipse((x, y, x + 80, y + 80), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


if __name__ == "__main__":
    main()
