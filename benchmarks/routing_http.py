"""Conversations over HTTP with four demo decoders, for `routing.py`."""

import asyncio
import base64
import io
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from PIL import Image, ImageDraw
from served import serving

ROOT = Path(__file__).parents[1]
NUM_DECODERS, CONCURRENCY, TURNS, BLOCK = 4, 4, 4, 64
SERVES_OWN = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"
QUESTIONS = ("What is it?", "What colour is it?", "What shape is it?", "Where is it?")
SYSTEM = "You are asked about pictures. Answer in a few words, and say what you see. " * 2


def measure(name: str, *, default: bool, num_talks: int, port: int) -> dict[str, Any]:
    """One server from start to end; `default`: with Serve's own router."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump(config(port, default)))
        os.environ["RAY_DEDUP_LOGS"] = "0"
        with serving(path, port) as (log, _):
            wait_for_decoders(log)
            before = decoder_cpu_s()
            began = time.monotonic()
            turns = asyncio.run(talk_all(f"http://127.0.0.1:{port}", num_talks))
            seconds = time.monotonic() - began
            used = [cpu_s - before[pid] for pid, cpu_s in decoder_cpu_s().items()]
    cached, had = (sum(values) for values in zip(*turns, strict=True))
    return {
        "router": name,
        "later_turns": len(turns),
        "hits": round(cached / had, 3),
        "whole_hits": round(statistics.mean(hit == whole for hit, whole in turns), 3),
        "balance": round(max(used) / (sum(used) / len(used)), 2),
        "decoder_cpu_s": round(sum(used), 1),
        "seconds": round(seconds, 1),
    }


def wait_for_decoders(log: Path) -> None:
    """Returns when all are loaded: the server is ready with the first."""
    deadline = time.monotonic() + 180
    while log.read_text(errors="replace").count("decoder ready after ") < NUM_DECODERS:
        if time.monotonic() > deadline:
            sys.exit(f"the decoders did not come up:\n{log.read_text()[-6000:]}")
        time.sleep(0.5)
    time.sleep(5)  # until Serve has asked for their health, and told the ingress


def config(port: int, default: bool) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    application = values["applications"][0]
    application["args"] |= {part: {"num_cpus": 0.1} for part in ("decoder", "encoder", "ingress")}
    for deployment in application["deployments"]:
        if deployment["name"] == "Decoder":
            deployment["num_replicas"] = NUM_DECODERS
            if default:
                deployment["request_router_config"] = {"request_router_class": SERVES_OWN}
    return values


async def talk_all(url: str, num_talks: int) -> list[tuple[int, int]]:
    """(cached, cacheable) tokens of each later turn of all conversations."""
    limit = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def one(seed: int) -> list[tuple[int, int]]:
            async with limit:
                return await talk(client, seed)

        found = await asyncio.gather(*(one(seed) for seed in range(num_talks)))
    return [turn for turns in found for turn in turns]


async def talk(client: httpx.AsyncClient, seed: int) -> list[tuple[int, int]]:
    """One conversation about a picture of its own, or one that some others have, too."""
    source = random.Random(seed)
    data = picture(random.Random(source.randrange(4) if source.random() < 0.3 else 1000 + seed))
    part = {"type": "image_url", "image_url": {"url": data}}
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    had, found = 0, []
    for number, question in enumerate(source.sample(QUESTIONS, TURNS)):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [part, text] if not number else [text]})
        body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24}
        answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        usage = answer["usage"]
        if number:
            # Others who ask alike about the picture may have come further: no more than all counts.
            found.append((min(had, usage["prompt_tokens_details"]["cached_tokens"]), had))
        had = (usage["prompt_tokens"] + usage["completion_tokens"] - 1) // BLOCK * BLOCK
        messages.append(answer["choices"][0]["message"])
    return found


def picture(source: random.Random) -> str:
    """A disc somewhere on white, as a data URL."""
    image = Image.new("RGB", (448, 448), "white")
    x, y, radius = (source.randrange(*span) for span in ((100, 348), (100, 348), (40, 100)))
    colour = source.choice(["#e01010", "#189030", "#1850e0", "#000000"])
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def decoder_cpu_s() -> dict[int, float]:
    """CPU seconds of each decoder below this process, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if title.startswith(b"ray::ServeReplica:xc_ray:Decoder") and _ours(int(entry.name)):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                found[int(entry.name)] = ticks / os.sysconf("SC_CLK_TCK")
        except OSError:  # it ended meanwhile
            continue
    return found


def _ours(pid: int) -> bool:
    while pid > 1 and pid != os.getpid():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == os.getpid()
