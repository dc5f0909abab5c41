"""`serve run serve_config.yaml` to the first answer about a picture, with the demo model.

    python benchmarks/first_answer.py

From the start of the command to the last byte of a streamed answer about examples/shapes.png, over
HTTP, on a fresh local Ray. Prints a table, then one JSON line.
"""

import argparse
import base64
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import httpx
import yaml
from served import serving

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs it `--runs` times, each with a Ray of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--port", type=int, default=8124)
    args = parser.parse_args()
    runs = [one_run(args.port) for _ in range(args.runs)]
    print(f"{'run':>4} {'ready, s':>10} {'first answer, s':>16}")
    for number, (ready, answered) in enumerate(runs, 1):
        print(f"{number:>4} {ready:>10.1f} {answered:>16.1f}")
    figures = {
        "benchmark": "first_answer",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ready_s": [ready for ready, _ in runs],
        "first_answer_s": [answered for _, answered in runs],
    }
    print(json.dumps(figures))


def one_run(port: int) -> tuple[float, float]:
    """Seconds to ready, and to the end of the first answer."""
    with tempfile.TemporaryDirectory() as folder:
        values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        values["http_options"]["port"] = port
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump(values))
        started = time.monotonic()
        with serving(path, port) as (_, ready):
            ask(port)
            return ready, round(time.monotonic() - started, 1)


def ask(port: int) -> None:
    """One streamed request about a picture, read to its end."""
    image = base64.b64encode((ROOT / "examples" / "shapes.png").read_bytes()).decode()
    url = f"data:image/png;base64,{image}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "stream": True,
    }
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    with httpx.stream("POST", address, json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    if response.status_code != 200 or lines[-1] != "data: [DONE]":
        raise SystemExit(f"HTTP {response.status_code}: {lines[-1:]}")


if __name__ == "__main__":
    main()
