"""How often a served model answers samples of the drawn world exactly, over HTTP.

    python benchmarks/demo_accuracy.py --model OUT/model --num 100

Starts `serve run` with serve_config.yaml and the model (or takes `--url`), draws `--num` samples of
each task, and sends each as one request, greedy, its pictures as PNG or JPEG files. Earlier turns
of a conversation are the server's own answers. An answer counts if it is the reference to the
letter. Printed texts are in fonts of training, and in fonts of other families that training never
shows (`held out`). `small_print, low detail` sends the pictures of `small_print` with
`detail: low`, one tile, in which it cannot be read. Prints a table, then one JSON line.
"""

import argparse
import asyncio
import base64
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import httpx
from served import serving_args

from xc_ray.demo.drawn.drawing import encode_picture
from xc_ray.demo.drawn.fonts import Fonts, find_fonts
from xc_ray.demo.drawn.tasks import HELD_OUT, Sample, held_out_sample

LOW = "small_print, low detail"
MAX_TOKENS = 80  # the longest description takes fewer
TASKS = [*HELD_OUT, *(f"chinese_{task}" for task in ("count", "what", "read", "two_turn")), LOW]


def main() -> None:
    """The table of all tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, or a folder (demo)")
    parser.add_argument("--url", help="a running server, like http://127.0.0.1:8000")
    parser.add_argument("--num", type=int, default=100, help="samples of each task (100)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK")
    parser.add_argument("--fonts", type=Path, action="append", default=[], help="more font folders")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--port", type=int, default=8126)
    args = parser.parse_args()
    fonts = find_fonts(args.fonts)
    sets = {"training": Fonts(fonts.training, ()), "held out": fonts}
    if not fonts.held_out:
        del sets["held out"]
        print("no held-out fonts are installed: see docs/design.md for the packages")
    began = time.monotonic()
    if args.url:
        shares = asyncio.run(examine(args.url, args, sets))
    else:
        with serving_args(args.port, model=args.model) as url:
            shares = asyncio.run(examine(url, args, sets))
    show(shares, list(sets), args, time.monotonic() - began)


def show(
    shares: dict[str, dict[str, float]], sets: list[str], args: argparse.Namespace, seconds: float
) -> None:
    """The table and the JSON line."""
    print(f"{'task':<26}" + "".join(f"{name:>12}" for name in sets))
    for task, row in shares.items():
        print(f"{task:<26}" + "".join(f"{row[name]:>12.1%}" for name in sets))
    figures = {
        "benchmark": "demo_accuracy",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": args.model,
        "num": args.num,
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "exact": shares,
    }
    print(json.dumps(figures))


async def examine(
    url: str, args: argparse.Namespace, sets: dict[str, Fonts]
) -> dict[str, dict[str, float]]:
    """The share of exact answers by task and set of fonts."""
    shares: dict[str, dict[str, float]] = {}
    gate = asyncio.Semaphore(args.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        for task in args.tasks:
            name, detail = ("small_print", "low") if task == LOW else (task, "auto")
            shares[task] = {
                kind: await exact_share(
                    Asked(client, model, gate, detail),
                    partial(held_out_sample, name, args.seed, fonts=fonts),
                    args.num,
                )
                for kind, fonts in sets.items()
            }
    return shares


@dataclass(frozen=True)
class Asked:
    """Who is asked: a model of a server, by as many requests at once as the gate lets through."""

    client: httpx.AsyncClient
    model: str
    gate: asyncio.Semaphore
    detail: str = "auto"


async def exact_share(asked: Asked, draw: Callable[[int], Sample], num: int) -> float:
    """The share of exact answers to the samples of indices below `num`."""

    async def right(index: int) -> bool:
        async with asked.gate:
            sample = await asyncio.to_thread(draw, index)
            said = await answer(asked.client, asked.model, sample, asked.detail)
            return said == sample.turns[-1][1]

    answers = await asyncio.gather(*(right(index) for index in range(num)))
    return sum(answers) / num


async def answer(client: httpx.AsyncClient, model: str, sample: Sample, detail: str) -> str:
    """The server's last answer of a conversation."""
    messages: list[dict[str, Any]] = []
    said = ""
    for number, (question, _) in enumerate(sample.turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if number == 0:
            urls = [picture_url(sample, i) for i in range(len(sample.pictures))]
            pictures = [
                {"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls
            ]
            content = [*pictures, *content]
        messages.append({"role": "user", "content": content})
        body = {
            "model": model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise SystemExit(f"HTTP {response.status_code}: {response.text[:500]}")
        said = response.json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": said})
    return said


def picture_url(sample: Sample, index: int) -> str:
    """A picture as a data URL; its format and quality follow from the sample alone."""
    data = encode_picture(sample.pictures[index], Random(f"{sample.turns[0][0]}-{index}"))
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


if __name__ == "__main__":
    main()
