"""A model at its real size through `serve run`: load time, memory, first token, tokens per second.

    python benchmarks/real_scale.py --variant 2.5 --work /tmp/xc

Makes a checkpoint with random weights of the published sizes (bf16), serves it with encoder and
decoder on one GPU by fractions that together declare `--budget-gb`, and sends requests over HTTP
with SSE. Device memory is what the driver reports for the whole GPU, contexts included, at its
highest. Without a GPU, or with `--tiny`, the tiny model runs on CPU: that tests the script and is
no figure.

Prints a table, then one JSON line.
"""

import argparse
import base64
import io
import json
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import httpx
import torch
import yaml
from PIL import Image
from served import serving

from xc_ray.demo.make import padded_tokenizer, save_random, tiny_config, train_tokenizer
from xc_ray.model.config import FAMILIES, XComposerConfig, preset
from xc_ray.prompt.tokenizer import TOKENIZER_FILE

ENCODER_GB = 2.0  # its weights are 0.7 GB; the rest is activations and a CUDA context
MAX_TOKENS = 128


def main() -> None:
    """Runs one variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variant", choices=list(FAMILIES), default="2.5")
    parser.add_argument("--work", type=Path, default=Path("/tmp/xc_ray_real_scale"))
    parser.add_argument("--budget-gb", type=float, default=21.0, help="tower and decoder together")
    parser.add_argument("--max-model-len", type=int, default=10304)
    parser.add_argument("--max-prefill-tokens", type=int, default=512)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--tiny", action="store_true", help="the tiny model on CPU")
    args = parser.parse_args()
    gpu = torch.cuda.is_available() and not args.tiny
    config = preset(args.variant) if gpu else tiny_config(args.variant)
    folder = args.work / "model"
    figures: dict[str, object] = {"variant": args.variant, "device": device_name(gpu)}
    started = time.monotonic()
    make(folder, config, gpu)
    figures["make_s"] = round(time.monotonic() - started, 1)
    serve_file = write_serve_file(args, folder, gpu)
    try:
        with Memory(gpu) as memory, serving(serve_file, args.port) as (log, started):
            figures |= {"ready_s": started, **load_times(log)}
            figures["memory_ready_gb"] = memory.now()
            figures |= measure(args.port, config, memory)
            figures["memory_peak_gb"] = memory.peak
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in figures.items():
        print(f"{name:<28} {value}")
    print(json.dumps({"benchmark": "real_scale", **figures}))


def device_name(gpu: bool) -> str:
    """The GPU's name and dtype, or that this is CPU."""
    return f"{torch.cuda.get_device_name(0)}, bf16" if gpu else "CPU, fp32 (tiny model: no figure)"


def make(folder: Path, config: XComposerConfig, gpu: bool) -> None:
    """The random checkpoint and a tokenizer of its vocabulary."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = (
        padded_tokenizer(config.decoder.vocab_size, config.tokens) if gpu else train_tokenizer()
    )
    (folder / TOKENIZER_FILE).write_bytes(tokenizer)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    save_random(folder, config, dtype=dtype, device=device)
    if gpu:
        torch.cuda.empty_cache()


def write_serve_file(args: argparse.Namespace, folder: Path, gpu: bool) -> Path:
    """The repository's serve_config.yaml with this model, the declared shares and a port."""
    values = yaml.safe_load(Path(__file__).parents[1].joinpath("serve_config.yaml").read_text())
    values["http_options"]["port"] = args.port
    app_args: dict[str, object] = {"model": str(folder), "served_model_name": "real"}
    if gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        app_args["encoder"] = {
            "num_gpus": round(ENCODER_GB * 1e9 / total, 4),
            "max_squares": 4,
        }
        app_args["decoder"] = {
            "num_gpus": round((args.budget_gb - ENCODER_GB) * 1e9 / total, 4),
            "max_num_seqs": 8,
            "max_prefill_tokens": args.max_prefill_tokens,
        }
        app_args["limits"] = {"max_tiles": FAMILIES[args.variant].max_tiles}
        length = min(args.max_model_len, preset(args.variant).decoder.max_length)
        app_args["max_model_len"] = app_args["decoder"]["kv_cache_tokens"] = length
    values["applications"][0]["args"] = app_args
    path = args.work / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def load_times(log: Path) -> dict[str, float]:
    """Seconds that the decoder's weights took, from its own log line."""
    found = re.search(r"decoder ready.*weights ([\d.]+) s", log.read_text())
    return {"decoder_load_s": float(found[1])} if found else {}


def measure(port: int, config: XComposerConfig, memory: "Memory") -> dict[str, object]:
    """Text, one HD picture, and several HD pictures: first token and tokens per second of each."""
    figures: dict[str, object] = {}
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)
    budget = config.family.max_tiles
    cases: dict[str, list[tuple[int, int, int]]] = {
        "warmup": [(1120, 560, 6)],
        "text": [],
        "one_hd": [(3360, 2240, budget)],  # 4 × 6 = 24 tiles of 560 px
        "several_hd": [(1680, 1120, 6), (1120, 1680, 6), (1120, 1120, 4)][: 3 if budget > 1 else 2],
    }
    for name, sizes in cases.items():
        result = ask(client, [picture(w, h, min(tiles, budget)) for w, h, tiles in sizes])
        if name == "warmup":
            continue
        memory.now()
        figures |= {f"{name}_{key}": value for key, value in result.items()}
    return figures


def picture(width: int, height: int, max_tiles: int) -> dict[str, object]:
    """An image part: a noisy gradient as JPEG in a data URI."""
    base = Image.effect_noise((width // 4, height // 4), 60).resize((width, height)).convert("RGB")
    out = io.BytesIO()
    base.save(out, "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, "max_tiles": max_tiles}}


def ask(client: httpx.Client, pictures: list[dict[str, object]]) -> dict[str, object]:
    """One streamed request: prompt tokens, seconds to the first token, tokens per second after."""
    content = [*pictures, {"type": "text", "text": "Describe what you see, in detail."}]
    body = {
        "model": "real",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    first = usage = None
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            sys.exit(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"the stream failed: {event}")
            if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.monotonic()
            usage = event.get("usage") or usage
    assert first is not None, "no token came"
    assert usage is not None, "no usage came"
    decoding = time.monotonic() - first
    generated = usage["completion_tokens"]
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "image_tokens": usage["prompt_tokens_details"]["image_tokens"],
        "first_token_s": round(first - started, 3),
        "tokens": generated,
        "tokens_per_s": round((generated - 1) / decoding, 1) if generated > 1 else None,
    }


class Memory:
    """Device memory in use, in GB (10⁹ bytes), sampled in the background while open."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._base = 0.0
        self.peak = 0.0

    def __enter__(self) -> "Memory":
        # This process made the checkpoint and holds a context of its own, which is not the
        # server's.
        self._base = self.now()
        self.peak = 0.0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def now(self) -> float:
        """Memory in use now, this process's own left out."""
        if not self._gpu:
            return 0.0
        free, total = torch.cuda.mem_get_info()
        used = round((total - free) / 1e9 - self._base, 2)
        self.peak = max(self.peak, used)
        return used

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.now()


if __name__ == "__main__":
    main()
