"""Options and cases of the parity tests.

    pytest tests/parity --golden DIR --tokenizer FILE

Without `--golden` the committed subset is used, without `--tokenizer` the file that DIR holds.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.golden import Case, Golden, Variant

SUBSET = Path(__file__).parent.parent / "data" / "golden"
_GOLDEN = pytest.StashKey[Golden]()
# The tests' argument -> where its cases come from.
_CASES: dict[str, Callable[[Golden], Iterable[Case | Variant]]] = {
    "variant": lambda golden: golden.variants,
    "picture_case": Golden.pictures,
    "processed_case": Golden.processed_pictures,
    "normalised_case": Golden.whole_normalised,
    "grid_case": Golden.grids,
    "embedding_case": Golden.embeddings,
    "tower_case": Golden.towers,
    "sample": Golden.samples,
    "conversation_sample": lambda golden: golden.samples_with("conversation"),
    "real_sample": lambda golden: golden.samples_with("real_ids"),
    "failed_sample": lambda golden: golden.samples_with("error"),
    "loss_sample": lambda golden: golden.samples_with("loss"),
    "gradient_sample": lambda golden: golden.samples_with("grad_norms"),
    "picture_sample": Golden.samples_with_pictures,
    "system_sample": Golden.samples_with_system_turn,
    "chat_case": Golden.chats,
    "answered_case": lambda golden: golden.chats_with("generated"),
    "failed_case": lambda golden: golden.chats_with("error"),
    "prompt_case": Golden.prompts,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--golden", metavar="DIR", help="folder of golden data (default: the subset)")
    group.addoption("--tokenizer", metavar="FILE", help="the published tokenizer.model")


def _golden(config: pytest.Config) -> Golden:
    if _GOLDEN not in config.stash:
        # Both are unknown to pytest when it was started above this folder.
        root, tokenizer = (config.getoption(n, default=None) for n in ("--golden", "--tokenizer"))
        here = config.invocation_params.dir
        golden = Golden(here / root if root else SUBSET, here / tokenizer if tokenizer else None)
        if not golden.variants:
            raise pytest.UsageError(f"{golden.root} has no <variant>/checkpoint/config.json")
        if tokenizer and not golden.tokenizer_file.is_file():
            raise pytest.UsageError(f"--tokenizer {tokenizer}: no such file")
        config.stash[_GOLDEN] = golden
    return config.stash[_GOLDEN]


def pytest_configure(config: pytest.Config) -> None:
    _golden(config)  # a wrong option is refused before anything is collected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, cases in _CASES.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, list(cases(_golden(metafunc.config))), ids=str)


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Golden:
    return _golden(pytestconfig)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which cost much where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
