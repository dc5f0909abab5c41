"""`xc-ray COMMAND`: parse the options, call one function, tell an error in one line.

Exit codes: 0 done, 1 an error of ours, 2 wrong usage, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xc_ray.cli_data import add_data
from xc_ray.cli_infer import add_infer
from xc_ray.cli_k8s import add_k8s
from xc_ray.cli_keys import add_keys
from xc_ray.cli_registry import add_registry
from xc_ray.cli_train import add_train
from xc_ray.cli_values import at_least_one, check_device, sampling
from xc_ray.errors import XcRayError
from xc_ray.logs import telling

if TYPE_CHECKING:
    from xc_ray.terminal import Backend, ChatOptions

INTERRUPTED = 130  # 128 + SIGINT, as shells count
# Says which credentials a store is reached with; whichever command does so.
STORES = "xc_ray.registry.client"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code; argparse exits itself after help or bad usage."""
    args = _parser().parse_args(argv)
    try:
        with telling(STORES, sys.stderr):
            code: int = args.run(args)
        sys.stdout.flush()
    except XcRayError as e:
        print(f"xc-ray: {' '.join(e.message.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 1  # whoever read our output has gone, as in `| head`
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-ray",
        description="Serve and fine-tune InternLM-XComposer2 and 2.5 models on Ray.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_chat(commands)
    _add_plan(commands)
    add_train(commands)
    add_data(commands)
    add_infer(commands)
    add_registry(commands)
    add_keys(commands)
    add_k8s(commands)
    return parser


# ---------------------------------------------------------------- chat


def _add_chat(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal. Pictures stand in a query as "
        "<img>path-or-URL</img>. `clear` empties the history, `multi-line` takes input that ends "
        "with #, `exit` ends.",
    )
    parser.set_defaults(run=_chat, fail=parser.error)
    where = parser.add_argument_group("model")
    where.add_argument(
        "--model",
        help="demo, a folder, a hub id or a base of the registry (default: demo); with --url the "
        "name of a served model (default: the server's first)",
    )
    where.add_argument(
        "--registry", metavar="URL", help="where a model NAME@… is (default: in the user's data)"
    )
    where.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    where.add_argument(
        "--url", type=_url, help="an OpenAI-compatible server, such as http://127.0.0.1:8000"
    )
    where.add_argument(
        "--key-file",
        metavar="FILE",
        help="holds the key for the server (default: $OPENAI_API_KEY holds it)",
    )
    # Known, to be refused in words that do not show it.
    where.add_argument("--api-key", help=argparse.SUPPRESS)
    answer = parser.add_argument_group("answer", "What is not given is the model family's default.")
    answer.add_argument("--system", metavar="TEXT", help='system text; "" for none')
    answer.add_argument("--temperature", type=sampling("temperature", float), metavar="T")
    answer.add_argument("--top-p", type=sampling("top_p", float), metavar="P")
    answer.add_argument("--top-k", type=sampling("top_k", int), metavar="K", help="0: off")
    answer.add_argument(
        "--repetition-penalty", type=sampling("repetition_penalty", float), metavar="R"
    )
    answer.add_argument(
        "--seed", type=sampling("seed", int), metavar="N", help="same answers again"
    )
    answer.add_argument(
        "--max-new-tokens",
        type=sampling("max_tokens", int),
        metavar="N",
        help="most of one answer",
    )
    answer.add_argument(
        "--stop",
        action="append",
        type=_text,
        metavar="TEXT",
        help="ends the answer; may be repeated",
    )
    answer.add_argument(
        "--max-tiles", type=at_least_one, metavar="N", help="tile budget of each picture"
    )
    answer.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print the answer as it comes, or in one go",
    )


def _chat(args: argparse.Namespace) -> int:
    from xc_ray.terminal import ChatOptions, Terminal

    if args.url and args.device:
        args.fail("--device is for a local model; leave it out with --url")
    if args.url and args.registry:
        args.fail("--registry is for a local model; leave it out with --url")
    if args.api_key is not None:
        args.fail(
            "--api-key: whoever lists processes would see the key; put it into a file "
            "(--key-file) or into $OPENAI_API_KEY"
        )
    if args.key_file and not args.url:
        args.fail("--key-file is for a server; give its --url")
    sampling = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "max_tokens": args.max_new_tokens,
    }
    options = ChatOptions(
        system=args.system,
        max_tiles=args.max_tiles,
        stop=tuple(args.stop or ()),
        sampling={name: value for name, value in sampling.items() if value is not None},
    )
    backend = _server(args, options) if args.url else _local(args, options)
    # Odd bytes in file names survive, and no answer is unprintable.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    Terminal(backend, live=args.stream).run()
    return 0


def _server(args: argparse.Namespace, options: "ChatOptions") -> "Backend":
    from xc_ray.api_key import find_key
    from xc_ray.client import Server

    key = find_key(args.key_file)
    if key is not None:
        print(f"xc-ray: the key is that of {key.source}", file=sys.stderr)
    value = key.value if key else None
    return Server.connect(args.url, options, model=args.model, api_key=value, live=args.stream)


def _local(args: argparse.Namespace, options: "ChatOptions") -> "Backend":
    from xc_ray.pipeline import Pipeline
    from xc_ray.terminal import Local

    if args.device:
        check_device(args.device)
    model = args.model or "demo"
    if args.registry:
        from xc_ray.hub import resolve_model

        model = resolve_model(model, args.registry)
    return Local(Pipeline.load(model, device=args.device), options)


# ---------------------------------------------------------------- plan


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from xc_ray.config import AUTO_DECODER_SHARE, AUTO_ENCODER_SHARE
    from xc_ray.engine.config import MAX_LORA_RANK
    from xc_ray.model.config import FAMILIES

    parser = commands.add_parser(
        "plan",
        help="what fits into a share of a device",
        description="Bytes of weights, activations and key/value cache of encoder and decoder, for "
        "their shares of one device, before anything loads. In bf16; 1 GB is 10⁹ bytes.",
    )
    parser.set_defaults(run=_plan)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--variant", choices=list(FAMILIES), help="a published 7B model")
    model.add_argument("--model", help="demo, a folder, a hub id or a base of the registry")
    parser.add_argument("--device-gb", type=_positive, required=True, metavar="GB")
    for name, share in (("encoder", AUTO_ENCODER_SHARE), ("decoder", AUTO_DECODER_SHARE)):
        parser.add_argument(
            f"--{name}-share", type=_positive, default=share, metavar="SHARE", help=f"({share})"
        )
    parser.add_argument("--max-model-len", type=at_least_one, metavar="N", help="(the family's)")
    parser.add_argument("--max-num-seqs", type=at_least_one, default=32, metavar="N", help="(32)")
    parser.add_argument(
        "--max-prefill-tokens", type=at_least_one, default=4096, metavar="N", help="(4096)"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="(auto: the model's own)"
    )
    parser.add_argument(
        "--adapter-slots", type=at_least_one, default=0, metavar="N", help="adapters at once (0)"
    )
    parser.add_argument(
        "--adapter-rank", type=_rank, default=MAX_LORA_RANK, metavar="R", help=f"({MAX_LORA_RANK})"
    )
    parser.add_argument("--max-squares", type=at_least_one, default=8, metavar="N", help="(8)")
    parser.add_argument(
        "--max-tiles", type=at_least_one, default=55, metavar="N", help="of one picture (55)"
    )


def _plan(args: argparse.Namespace) -> int:
    from xc_ray.hub import resolve_model
    from xc_ray.model.config import preset
    from xc_ray.model.layout import read_layout
    from xc_ray.plan import budget_of, decoder_plan, encoder_plan, render

    config = preset(args.variant) if args.variant else read_layout(resolve_model(args.model)).config
    length = args.max_model_len or config.decoder.max_length
    device = int(args.device_gb * 1e9)
    encoder = encoder_plan(
        config,
        budget_of(args.encoder_share, device),
        max_squares=args.max_squares,
        max_tiles=args.max_tiles,
    )
    decoder = decoder_plan(
        config,
        budget_of(args.decoder_share, device),
        max_num_seqs=args.max_num_seqs,
        max_prefill_tokens=args.max_prefill_tokens,
        max_model_len=length,
        kv_cache_dtype=args.kv_cache_dtype,
        adapter_slots=args.adapter_slots,
        adapter_rank=args.adapter_rank,
    )
    print(render([encoder, decoder], max_model_len=length))
    encoder.check()
    decoder.check(length)
    return 0


# ---------------------------------------------------------------- values of options


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _rank(text: str) -> int:
    from xc_ray.engine.config import MAX_LORA_RANK

    rank = at_least_one(text)
    if rank > MAX_LORA_RANK:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_LORA_RANK}")
    return rank


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not start with http:// or https://")
    return text
