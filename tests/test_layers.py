"""Who may import whom: the one direction of the package, read from the imports themselves.

Every import counts: at the top of a file, inside a function, under `if TYPE_CHECKING`, and
`import_module("a.literal")`. A lazy import is for a heavy package; it never hides a cycle.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "xc_ray"
ROOT = Path(__file__).parents[1] / PACKAGE

# The tables name modules without "xc_ray.". A row speaks for its module and for everything below
# it; of two rows that fit, the longer one counts. A module without a row fails: a new room is a
# decision, and it is taken here.

# Ours. `errors` is open to everybody and therefore in no row.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    # What a person sends, made into numbers.
    "prompt": ("prompt", "model.config"),
    # The network.
    "model": ("model",),
    "model.config": (),
    # The Auto classes carry the processor, and a processor is the prompt room under HF's name.
    "model.hf": ("model", "prompt"),
    "model.hf_processor": ("model", "prompt"),
    # Continuous batching. It knows ids and embeddings, so it never sees prompt, serve or registry.
    "engine": ("engine", "model"),
    "engine.config": (),
    # Bytes and manifests.
    "registry": ("registry",),
    # The bundled model and the tests' tiny ones: made of the real model and tokenizer.
    "demo": ("demo", "model", "prompt"),
    "demo.drawn": ("demo.drawn", "errors", "model.config", "prompt.tiles"),
    # The demo model's own training, of all its weights, on what `train` has for LoRA.
    "demo.batches": ("demo.drawn", "model.config", "prompt", "train.data", "train.network"),
    "demo.network": ("demo.batches", "demo.drawn", "model", "train.network"),
    "demo.exam": (
        "demo.batches",
        "demo.drawn",
        "demo.network",
        "model",
        "prompt.tokenizer",
        "train.data",
    ),
    "demo.pretrain": ("demo", "logs", "model", "prompt.tokenizer", "train.network"),
    # A model's name -> its folder.
    "hub": ("registry",),
    # Checkpoints and adapters: which base a folder is, into the registry, and merged into one.
    "fingerprint": ("hub", "model", "registry"),
    "publish": ("fingerprint", "hub", "model", "registry"),
    "merge": ("model", "proof"),
    "proof": ("model", "prompt"),
    # The typed configuration, and what is derived from it before anything loads.
    "config": ("model.config", "engine.config"),
    "keys": ("config", "registry.reference"),
    "plan": ("model.config", "engine.config", "config"),
    "k8s": ("config",),
    # Ray Serve around the rooms above. Deployments reach each other by handles, not by imports;
    # only `app` sees them all.
    "serve.observe": (),
    "serve.redaction": (),
    "serve.protocol": (),
    "serve.openapi": ("serve.answers", "serve.protocol"),
    "serve.answers": (),
    "serve.fetch": ("serve.observe",),
    "serve.auth": ("config", "keys"),
    "serve.exposure": (),
    "serve.held": (),
    "serve.refusals": ("serve.answers",),
    "serve.guard": ("serve.auth", "serve.refusals"),
    "serve.admission": ("config",),
    # By value in Serve's controller, where it may import nothing of ours.
    "serve.scale": (),
    "serve.signals": (),
    "serve.prefixes": ("prompt.sequence",),
    "serve.affinity": ("serve.prefixes",),
    "serve.door": (),
    "serve.router": ("serve.affinity", "serve.door", "serve.observe", "serve.prefixes"),
    "serve.messages": ("prompt.tiles",),
    "serve.device": ("config", "plan"),
    # The vision encoder: which squares run next, running them, and what is kept of it.
    "serve.squares": (),
    "serve.embedding_cache": ("serve.observe",),
    "serve.square_driver": ("serve.observe", "serve.signals", "serve.squares"),
    "serve.square_runner": ("config", "model", "prompt.tiles"),
    "serve.encoder": (
        "config",
        "hub",
        "model",
        "plan",
        "prompt.tiles",
        "serve.device",
        "serve.embedding_cache",
        "serve.messages",
        "serve.observe",
        "serve.redaction",
        "serve.scale",
        "serve.signals",
        "serve.square_driver",
        "serve.square_runner",
        "serve.squares",
        "serve.startup",
    ),
    "serve.driver": (
        "engine",
        "serve.messages",
        "serve.observe",
        "serve.scale",
        "serve.signals",
    ),
    "serve.lobby": (
        "config",
        "engine.config",
        "serve.admission",
        "serve.messages",
        "serve.observe",
        "serve.scale",
    ),
    # Adapters on one decoder, from the store to a request.
    "serve.background": (),
    "serve.startup": (),
    "serve.served_base": ("registry", "serve.background"),
    "serve.watch": ("registry", "serve.background", "serve.observe"),
    "serve.host_cache": ("engine", "registry", "serve.observe"),
    "serve.aliases": (
        "registry",
        "serve.background",
        "serve.host_cache",
        "serve.messages",
        "serve.observe",
        "serve.served_base",
        "serve.watch",
    ),
    "serve.adapters": (
        "registry",
        "serve.aliases",
        "serve.host_cache",
        "serve.messages",
        "serve.observe",
        "serve.served_base",
        "serve.watch",
    ),
    "serve.opening": (
        "config",
        "engine",
        "fingerprint",
        "hub",
        "model",
        "registry",
        "serve.adapters",
        "serve.host_cache",
        "serve.observe",
        "serve.served_base",
        "serve.watch",
    ),
    "serve.fit": ("config", "engine", "model", "plan", "serve.device"),
    "serve.decoder": (
        "config",
        "engine",
        "hub",
        "model",
        "serve.adapters",
        "serve.device",
        "serve.driver",
        "serve.fit",
        "serve.lobby",
        "serve.messages",
        "serve.observe",
        "serve.opening",
        "serve.redaction",
        "serve.startup",
        "serve.prefixes",
    ),
    "serve.cards": (
        "registry.reference",
        "registry.resolve",
        "serve.answers",
        "serve.messages",
    ),
    "serve.record": ("serve.observe",),
    "serve.answering": (
        "prompt",
        "serve.answers",
        "serve.messages",
        "serve.protocol",
        "serve.record",
    ),
    "serve.intake": (
        "config",
        "model.config",
        "prompt",
        "serve.fetch",
        "serve.held",
        "serve.messages",
        "serve.prefixes",
        "serve.protocol",
    ),
    "serve.ingress": (
        "config",
        "model.config",
        "prompt.tokenizer",
        "registry.reference",
        "serve.intake",
        "serve.messages",
        "serve.protocol",
        "serve.answering",
        "serve.answers",
        "serve.cards",
        "serve.auth",
        "serve.admission",
        "serve.door",
        "serve.background",
        "serve.exposure",
        "serve.guard",
        "serve.held",
        "serve.observe",
        "serve.openapi",
        "serve.record",
        "serve.redaction",
        "serve.refusals",
    ),
    "serve.app": (
        "config",
        "engine.config",
        "hub",
        "keys",
        "model.config",
        "model.layout",
        "plan",
        "prompt.tokenizer",
        "publish",
        "registry",
        "serve",
    ),
    # Ray Train around model and prompt. `data` stands alone: `infer` reads data sets with it.
    "train": ("train", "config", "logs", "model", "prompt", "registry", "hub"),
    # The whole of a run: first what it stands on, then Ray Train.
    "train.job": ("config", "registry", "train"),
    "train.prepare": (
        "config",
        "fingerprint",
        "hub",
        "model.config",
        "model.layout",
        "prompt.tokenizer",
        "registry.store",
        "train.preflight",
        "train.publisher",
        "train.rows",
    ),
    "train.publisher": ("config", "publish", "registry"),
    "train.cluster": (),
    "train.data": ("prompt", "model.config"),
    "train.rows": ("prompt", "train.data"),
    # Data sets, read and checked without Ray: `infer` and `xc-ray data` use them too.
    "train.formats": ("prompt", "train.data", "train.rows"),
    "train.question": ("model.config", "prompt", "train.data", "train.rows"),
    "train.sources": ("demo", "hub", "registry", "train.rows"),
    "train.reading": ("registry", "source", "train.formats", "train.rows", "train.sources"),
    "train.check": (
        "config",
        "model.config",
        "prompt",
        "train.data",
        "train.reading",
        "train.rows",
        "train.sources",
    ),
    "train.report": ("train.check",),
    "train.crew": (),
    "train.preflight": (
        "config",
        "model.config",
        "prompt",
        "train.check",
        "train.crew",
        "train.data",
        "train.reading",
        "train.report",
        "train.rows",
    ),
    # What a run leaves to look at.
    "train.metrics": (),
    "train.trackers": ("config",),
    "train.curves": (),
    # The fronts: nobody but these imports `pipeline`, and only `__main__` imports `cli`.
    "pipeline": ("prompt", "model", "engine", "registry", "demo", "hub", "source"),
    # What a person at their own machine names as a picture.
    "source": ("prompt.query",),
    "terminal": ("pipeline", "prompt"),
    "client": ("terminal", "pipeline", "prompt"),
    # A data set through the engine.
    "infer": ("infer", "model", "prompt", "train.question", "train.reading", "train.rows"),
    "infer.rouge": (),
    "infer.rows": ("model.config", "train.question", "train.reading", "train.rows"),
    "infer.model": ("fingerprint", "hub", "model", "registry"),
    "infer.engine": (
        "engine",
        "infer.model",
        "infer.pictures",
        "infer.rows",
        "model",
        "plan",
        "prompt",
        "train.question",
    ),
    "infer.output": ("infer.rows", "registry.lock"),
    "cli_infer": ("cli_values", "infer", "interrupt", "progress"),
    # Values of options.
    "cli_values": ("engine",),
    # How far a command is, and how Ctrl-C ends it; a version as a folder of one's own.
    "logs": (),
    "progress": (),
    "interrupt": (),
    "pull": ("registry",),
    "cli_registry": ("cli_registry_run", "registry.reference"),
    "cli_registry_run": (
        "cli_listing",
        "config",
        "fingerprint",
        "hub",
        "interrupt",
        "merge",
        "model",
        "progress",
        "publish",
        "pull",
        "registry",
    ),
    "cli_listing": ("progress", "registry"),
    "cli_train": ("config", "logs", "progress", "train.job"),
    "cli_keys": ("keys", "registry.reference"),
    "cli_k8s": ("k8s",),
    "api_key": (),
    "cli_data": (
        "cli_values",
        "config",
        "hub",
        "interrupt",
        "model",
        "progress",
        "prompt",
        "train",
    ),
    "cli": (
        "api_key",
        "cli_data",
        "cli_infer",
        "cli_k8s",
        "cli_keys",
        "cli_registry",
        "cli_train",
        "cli_values",
        "client",
        "config",
        "demo",
        "engine",
        "hub",
        "infer",
        "logs",
        "model",
        "pipeline",
        "plan",
        "prompt",
        "registry",
        "serve",
        "terminal",
        "train",
    ),
    "__main__": ("cli",),
}

# Installed packages, for the rooms that are made of a few; a room without a row takes what it
# needs, within the rules for torch and ray below. The standard library is open to all.
MAY_USE: dict[str, tuple[str, ...]] = {
    "errors": (),
    "config": ("pydantic", "yaml"),
    "keys": ("pydantic", "yaml"),
    "k8s": ("pydantic", "yaml"),
    "prompt": ("numpy", "PIL", "sentencepiece"),
    "model": ("huggingface_hub", "numpy", "safetensors", "torch", "transformers"),
    "model.adapter_config": (),
    "model.config": (),
    "model.layout": (),
    "model.hf_processor": ("numpy", "PIL", "torch", "transformers"),
    "engine": ("numpy", "torch", "triton"),
    "engine.config": (),
    # pyarrow: the same place as Ray Train's filesystem.
    "registry": ("obstore", "pyarrow", "pydantic"),
    "demo": ("huggingface_hub", "numpy", "PIL", "safetensors", "sentencepiece", "torch"),
    "demo.drawn": ("numpy", "PIL"),
    "serve.protocol": ("pydantic", "pydantic_core"),
    "serve.answers": ("pydantic",),
    "serve.auth": (),
    "serve.guard": ("starlette",),
    "serve.held": (),
    "serve.scale": ("ray",),  # its types alone
    "serve.signals": (),
    "serve.squares": (),
    "serve.embedding_cache": ("numpy",),
    "serve.square_driver": (),
    # The choice of a replica is the same without Ray.
    "serve.prefixes": (),
    "serve.affinity": (),
}

# torch takes seconds to import and a gigabyte to install: these never reach it, nor what brings it,
# not even through another module of ours.
NEVER_TORCH = (
    "errors",
    "config",
    "prompt",
    "registry",
    "model.config",
    "engine.config",
    "engine.sequence",
    "engine.block_manager",
    "engine.scheduler",
    "serve.protocol",
    "serve.answering",
    "serve.answers",
    "serve.cards",
    "serve.fetch",
    "keys",
    "serve.auth",
    "serve.guard",
    "serve.exposure",
    "serve.held",
    "serve.refusals",
    "serve.admission",
    "serve.ingress",
    "serve.intake",
    "serve.messages",
    "serve.scale",
    "serve.signals",
    "serve.squares",
    "serve.embedding_cache",
    "serve.square_driver",
    "serve.door",
    "serve.router",  # and with it what it chooses by
)
BRINGS_TORCH = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors.torch",
    "ray.train.torch",
)

MAY_USE_RAY = ("serve", "train")

# `xc-ray --help` answers at once: at its top cli imports these of ours; the rest, and ray, inside
# the command that needs it.
CLI_AT_THE_TOP = (
    "cli_data",
    "cli_infer",
    "cli_k8s",
    "cli_keys",
    "cli_registry",
    "cli_train",
    "cli_values",
    "config",
    "errors",
    "logs",
)
CLI = (
    "cli",
    "cli_data",
    "cli_infer",
    "cli_k8s",
    "cli_keys",
    "cli_registry",
    "cli_train",
    "cli_values",
)

# Beside the package in the repository, absent where it is installed.
NOT_SHIPPED = ("tests", "benchmarks", "examples")


# ---------------------------------------------------------------- the reader


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is absolute, "xc_ray.prompt.chat" or "torch.nn"."""

    target: str
    line: int
    at_top: bool  # runs when the module is imported: neither in a function nor under TYPE_CHECKING

    @property
    def ours(self) -> str | None:
        """The target without "xc_ray." (empty for the bare package), or None for a foreign one."""
        if self.target == PACKAGE:
            return ""
        return self.target.removeprefix(PACKAGE + ".") if within(self.target, (PACKAGE,)) else None


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def imports_of(module: str, source: str, modules: set[str]) -> list[Import]:
    """Every import of `source`, in order; `modules` tells packages from modules."""
    return list(_walk(ast.parse(source, filename=module), module, modules, at_top=True))


def _walk(node: ast.AST, module: str, modules: set[str], *, at_top: bool) -> Iterator[Import]:
    for target in _targets(node, module, modules):
        yield Import(target, getattr(node, "lineno", 0), at_top)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        at_top = False
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        for statement in node.body:
            yield from _walk(statement, module, modules, at_top=False)
        for statement in node.orelse:
            yield from _walk(statement, module, modules, at_top=at_top)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, module, modules, at_top=at_top)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _targets(node: ast.AST, module: str, modules: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if (
            node.level
        ):  # `from ..model import x` in "engine.runner": one level up from xc_ray.engine
            package = f"{PACKAGE}.{module}".split(".")[: -node.level]
            base = ".".join([*package, base] if base else package)
        for alias in node.names:
            # In a module of ours the name is a function or a class; elsewhere it may be a module.
            is_module = within(base, (PACKAGE,)) and not _is_package(base, modules)
            yield base if is_module else f"{base}.{alias.name}"
    elif isinstance(node, ast.Call) and node.args:
        name = ast.unparse(node.func).rpartition(".")[2]
        literal = node.args[0]
        if name in ("import_module", "__import__") and isinstance(literal, ast.Constant):
            yield str(literal.value)


def _is_package(name: str, modules: set[str]) -> bool:
    return name == PACKAGE or any(
        f"{PACKAGE}.{module}".startswith(name + ".") for module in modules
    )


# ---------------------------------------------------------------- the rules


def violations(sources: dict[str, str]) -> list[str]:
    """What is wrong with a package of these modules ("prompt.chat", "prompt.__init__")."""
    imports = {
        module: imports_of(module, source, set(sources)) for module, source in sources.items()
    }
    found = [
        *_filled_inits(sources),
        *_edges(imports),
        *_installed_packages(imports),
        *_ray(imports),
        *_cli_at_the_top(imports),
        *_torch(imports),
        *_cycles(imports),
    ]
    return list(dict.fromkeys(found))  # once for each import, however many names it takes


def _row(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
    return max((room for room in table if within(module, (room,))), key=len, default=None)


def _is_init(module: str) -> bool:
    return module == "__init__" or module.endswith(".__init__")


def _where(module: str, found: Import) -> str:
    return f"{_file(module)}:{found.line} imports {found.target}"


def _file(module: str) -> str:
    return f"{PACKAGE}/{module.replace('.', '/')}.py"


def _filled_inits(sources: dict[str, str]) -> Iterator[str]:
    for module, source in sources.items():
        if _is_init(module) and source.strip():
            yield f"{_file(module)} is not empty: move its lines into a module"


def _edges(imports: dict[str, list[Import]]) -> Iterator[str]:
    for module, found in imports.items():
        if _is_init(module):
            continue
        row = _row(module, MAY_IMPORT)
        if row is None:
            yield f"{_file(module)} has no row in MAY_IMPORT: say there what it may import"
            continue
        open_to_it = MAY_IMPORT[row] if row == "errors" else (*MAY_IMPORT[row], "errors")
        for one in found:
            if one.ours is not None and not within(one.ours, open_to_it):
                allowed = ", ".join(open_to_it) or "nothing of ours"
                yield f"{_where(module, one)}, but {row} may import: {allowed}"


def _installed_packages(imports: dict[str, list[Import]]) -> Iterator[str]:
    for module, found in imports.items():
        row = _row(module, MAY_USE)
        for one in found:
            top = one.target.partition(".")[0]
            if top in NOT_SHIPPED:
                yield f"{_where(module, one)}, which is not shipped with {PACKAGE}"
            elif row is None or one.ours is not None or top in sys.stdlib_module_names:
                continue
            elif not within(one.target, MAY_USE[row]):
                allowed = ", ".join(MAY_USE[row]) or "the standard library only"
                yield f"{_where(module, one)}, but {row} is made of: {allowed}"


def _ray(imports: dict[str, list[Import]]) -> Iterator[str]:
    for module, found in imports.items():
        for one in found:
            if not within(one.target, ("ray",)) or within(module, MAY_USE_RAY):
                continue
            if module != "cli":
                yield f"{_where(module, one)}, but ray belongs in {' and '.join(MAY_USE_RAY)}"
            elif one.at_top:
                yield f"{_where(module, one)}, but cli imports ray inside the command that needs it"


def _cli_at_the_top(imports: dict[str, list[Import]]) -> Iterator[str]:
    for module in CLI:
        for one in imports.get(module, []):
            if one.at_top and one.ours is not None and not within(one.ours, CLI_AT_THE_TOP):
                allowed = ", ".join(CLI_AT_THE_TOP)
                yield f"{_where(module, one)}, but at its top {module} imports only: {allowed}"


def _torch(imports: dict[str, list[Import]]) -> Iterator[str]:
    for module in imports:
        if within(module, NEVER_TORCH) and (chain := _way_to_torch(module, imports)):
            yield f"{module} must not reach torch: {' -> '.join(chain)}"


def _way_to_torch(start: str, imports: dict[str, list[Import]]) -> list[str]:
    """The shortest chain of imports from `start` to what brings torch; empty if there is none."""
    seen, queue = {start}, [[start]]
    for chain in queue:  # grows while it is read: breadth first
        for one in imports[chain[-1]]:
            if within(one.target, BRINGS_TORCH):
                return [*chain, one.target]
            if one.ours in imports and one.ours not in seen:
                seen.add(one.ours)
                queue.append([*chain, one.ours])
    return []


def _cycles(imports: dict[str, list[Import]]) -> Iterator[str]:
    graph = {
        module: {one.ours for one in found if one.ours in imports}
        for module, found in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib lists a cycle from the imported module to its importer.
        yield f"import cycle: {' -> '.join(reversed(error.args[1]))}"


# ---------------------------------------------------------------- the package as it is


def package_sources() -> dict[str, str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(ROOT.rglob("*.py"))
    }


def test_the_package_keeps_its_layers():
    found = violations(package_sources())
    assert not found, "\n".join(["the import rules (tests/test_layers.py) are broken:", *found])


def test_the_reader_finds_the_package():
    sources = package_sources()
    assert {"errors", "prompt.__init__", "model.__init__", "engine.__init__"} <= set(sources)


def test_every_room_named_in_a_table_has_a_row():
    named = {room for rooms in MAY_IMPORT.values() for room in rooms}
    named |= {*MAY_USE, *NEVER_TORCH, *MAY_USE_RAY, *CLI_AT_THE_TOP}
    unknown = {
        room
        for room in named
        if not (_row(room, MAY_IMPORT) or _is_package(f"{PACKAGE}.{room}", set(MAY_IMPORT)))
    }
    assert not unknown


# ---------------------------------------------------------------- the rules can fail

BROKEN = {
    "errors imports something of ours": (
        {"errors": "from xc_ray.config import TrainConfig"},
        "errors.py:1 imports xc_ray.config, but errors may import: nothing of ours",
    ),
    "errors uses an installed package": (
        {"errors": "import pydantic"},
        "the standard library only",
    ),
    "model.config imports a sibling": (
        {"model.config": "from xc_ray.model.rope import base"},
        "but model.config may import: errors",
    ),
    "model.config uses numpy": (
        {"model.config": "import numpy as np"},
        "the standard library only",
    ),
    "engine.config uses pydantic": (
        {"engine.config": "import pydantic"},
        "engine.config is made of",
    ),
    "engine.config imports the engine": (
        {"engine.config": "from xc_ray.engine.sequence import Sequence"},
        "but engine.config may import: errors",
    ),
    "prompt imports more of model than its config": (
        {"prompt.tiles": "from xc_ray.model.vision import Tower"},
        "but prompt may import",
    ),
    "prompt uses httpx": ({"prompt.tiles": "import httpx"}, "prompt is made of: numpy, PIL"),
    "model imports the engine": (
        {"model.decoder": "import xc_ray.engine.kv_cache"},
        "but model may",
    ),
    "model uses ray": ({"model.weights": "import ray"}, "ray belongs in serve and train"),
    "engine imports prompt": (
        {"engine.engine": "from xc_ray.prompt.tokenizer import Tokenizer"},
        "but engine may import",
    ),
    "engine uses HTTP": ({"engine.engine": "import starlette.requests"}, "engine is made of"),
    "registry imports model": (
        {"registry.cache": "from xc_ray.model.weights import load"},
        "but registry may import",
    ),
    "demo imports the engine": (
        {"demo.make": "from xc_ray.engine.engine import Engine"},
        "but demo may",
    ),
    "config imports serve": ({"config": "from xc_ray.serve.app import build"}, "but config may"),
    "plan imports more of model than its config": (
        {"plan": "from xc_ray.model.xcomposer import XComposer"},
        "but plan may",
    ),
    "k8s imports plan": ({"k8s": "import xc_ray.plan"}, "but k8s may"),
    "serve imports train": ({"serve.app": "from xc_ray.train.job import fit"}, "but serve.app may"),
    "train imports serve": (
        {"train.job": "from xc_ray.serve.app import build"},
        "but train.job may",
    ),
    "the ingress imports the engine": (
        {"serve.ingress": "from xc_ray.engine.sequence import SamplingParams"},
        "but serve.ingress may",
    ),
    "the ingress imports a deployment": (
        {"serve.ingress": "from xc_ray.serve.decoder import Decoder"},
        "but serve.ingress may",
    ),
    "the encoder imports more of prompt than tiles": (
        {"serve.encoder": "from xc_ray.prompt.chat import Message"},
        "but serve.encoder may",
    ),
    "the decoder imports prompt": (
        {"serve.decoder": "import xc_ray.prompt.tiles"},
        "but serve.decoder may",
    ),
    "the wire format imports its reader": (
        {"serve.protocol": "from xc_ray.serve.auth import Key"},
        "but serve.protocol may",
    ),
    "a room of serve is not in the table": (
        {"serve.gateway": "import asyncio"},
        "xc_ray/serve/gateway.py has no row in MAY_IMPORT",
    ),
    "train.data imports model": (
        {"train.data": "import xc_ray.model.decoder"},
        "but train.data may",
    ),
    "somebody imports pipeline": (
        {"train.job": "from xc_ray.pipeline import Pipeline"},
        "but train.job may",
    ),
    "somebody imports cli": ({"pipeline": "from xc_ray.cli import main"}, "but pipeline may"),
    "infer imports the training job": (
        {"infer.job": "from xc_ray.train.job import fit"},
        "but infer may",
    ),
    "__main__ does more than cli": (
        {"__main__": "import xc_ray.config"},
        "but __main__ may import: cli",
    ),
    "the bare package is imported": ({"k8s": "import xc_ray"}, "k8s.py:1 imports xc_ray, but"),
    "torch in prompt": ({"prompt.tiles": "import torch"}, "prompt is made of"),
    "torch in the fetcher": ({"serve.fetch": "import torch"}, "serve.fetch -> torch"),
    "torch in auth": ({"serve.auth": "import torch.nn"}, "serve.auth -> torch.nn"),
    "torch in admission": ({"serve.admission": "from torch import nn"}, "serve.admission -> torch"),
    "torch in the block manager": (
        {"engine.block_manager": "import torch"},
        "engine.block_manager -> torch",
    ),
    "torch through transformers": (
        {"serve.ingress": "from transformers import AutoTokenizer"},
        "serve.ingress -> transformers",
    ),
    "torch three modules away": (
        {
            "serve.ingress": "from xc_ray.serve.intake import Intake",
            "serve.intake": "from xc_ray.serve.fetch import fetch",
            "serve.fetch": "def probe():\n    from xc_ray.serve.observe import timer",
            "serve.observe": "import torch",
        },
        "serve.ingress -> serve.intake -> serve.fetch -> serve.observe -> torch",
    ),
    "ray in pipeline, inside a function": (
        {"pipeline": "def load():\n    from ray import serve"},
        "pipeline.py:2 imports ray.serve, but ray belongs in",
    ),
    "ray at the top of cli": ({"cli": "import ray"}, "inside the command that needs it"),
    "a heavy module at the top of cli": (
        {"cli": "try:\n    from xc_ray.pipeline import Pipeline\nfinally:\n    pass"},
        "cli.py:2 imports xc_ray.pipeline, but at its top cli imports only: ",
    ),
    "the package imports its tests": (
        {"demo.make": "from tests.reference import rope"},
        "not shipped",
    ),
    "an __init__ with a line in it": (
        {"serve.__init__": "__all__ = []"},
        "xc_ray/serve/__init__.py is not empty",
    ),
    "two modules import each other": (
        {
            "engine.runner": "from xc_ray.engine.batch import Batch",
            "engine.batch": "def f():\n    from xc_ray.engine.runner import Runner",
        },
        "import cycle: ",
    ),
    "a cycle for annotations only": (
        {
            "model.rope": "if TYPE_CHECKING:\n    from xc_ray.model import decoder",
            "model.decoder": "from xc_ray.model.rope import base",
        },
        "import cycle: ",
    ),
}


@pytest.mark.parametrize(("sources", "report"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rule_is_reported(sources: dict[str, str], report: str):
    assert any(report in line for line in violations(sources)), violations(sources)


@pytest.mark.parametrize(
    "line",
    [
        "import xc_ray.serve.app",
        "import os, xc_ray.serve.app as app",
        "from xc_ray.serve.app import build",
        "from xc_ray.serve import app",
        "from ..serve.app import build",
        "from ..serve import app",
        "from .. import serve",
        "def f():\n    import xc_ray.serve.app",
        "async def f():\n    from xc_ray.serve import app",
        "class C:\n    def f(self):\n        from xc_ray.serve import app",
        "if TYPE_CHECKING:\n    from xc_ray.serve.app import build",
        "if typing.TYPE_CHECKING:\n    from xc_ray.serve import app",
        "try:\n    import xc_ray.serve.app\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('xc_ray.serve.app')",
        "__import__('xc_ray.serve.app')",
    ],
)
def test_import_is_seen_however_it_is_written(line: str):
    assert any("but prompt may import" in found for found in violations({"prompt.chat": line}))


def test_relative_import_of_a_sibling_is_the_sibling():
    sources = {"serve.encoder": "from . import decoder", "serve.decoder": ""}
    assert violations(sources) == [
        "xc_ray/serve/encoder.py:1 imports xc_ray.serve.decoder, "
        "but serve.encoder may import: config, hub, model, plan, prompt.tiles, serve.device, "
        "serve.embedding_cache, serve.messages, serve.observe, serve.redaction, serve.scale, "
        "serve.signals, serve.square_driver, serve.square_runner, serve.squares, serve.startup, "
        "errors"
    ]


def test_one_import_of_many_names_is_reported_once():
    sources = {"k8s": "from xc_ray.plan import parts, share, fits"}
    assert len(violations(sources)) == 1


def test_cycle_is_reported_in_the_order_of_its_imports():
    sources = {
        "model.plora": "import xc_ray.model.rope",
        "model.rope": "import xc_ray.model.attention",
        "model.attention": "import xc_ray.model.plora",
    }
    (report,) = violations(sources)
    # A cycle starts anywhere: twice around it holds every turn.
    around = "model.plora -> model.rope -> model.attention -> "
    assert report.removeprefix("import cycle: ") in around * 2


def test_sound_package_is_not_reported():
    sources = {
        "__init__": "",
        "errors": "from typing import Any",
        "model.__init__": "",
        "model.config": "import dataclasses\nfrom xc_ray.errors import ConfigError",
        "model.decoder": "import torch\nfrom xc_ray.model import config\nfrom .rope import base",
        "model.adapter": "from safetensors.torch import load_file",
        "prompt.tiles": "import numpy as np\nfrom PIL import Image\nimport xc_ray.model.config",
        "prompt.sequence": "from .tiles import Grid\nfrom xc_ray.errors import InvalidRequest",
        "engine.config": "from dataclasses import dataclass",
        "engine.kernels.paged": "import triton\nfrom xc_ray.model.attention import Attend",
        "config": "import pydantic, yaml\nfrom xc_ray.engine.config import EngineConfig",
        "serve.protocol": "from pydantic import BaseModel",
        "serve.ingress": "import ray.serve, xc_ray.prompt.tokenizer\nfrom .protocol import Request",
        "serve.decoder": "import ray, torch\nfrom xc_ray.engine.engine import Engine",
        "serve.app": "from xc_ray.config import ServeConfig\nfrom .decoder import Decoder",
        "train.loop": "import peft, ray.train\nfrom xc_ray.model.xcomposer import XComposer",
        "train.data": "import torch\nfrom xc_ray.prompt.sequence import build",
        "pipeline": "from xc_ray.engine.engine import Engine\nfrom xc_ray.demo.files import folder",
        "infer.job": "from .engine import Answerer\nfrom xc_ray.train.reading import rows",
        "cli": "import argparse, xc_ray.config\ndef chat():\n    import ray, xc_ray.pipeline",
        "__main__": "from xc_ray.cli import main",
    }
    assert violations(sources) == []
