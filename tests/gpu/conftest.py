"""A small decoder that a GPU's kernels take, and tiles for its sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from xc_ray.demo.make import save_random, tiny_config
from xc_ray.engine.kernels import skinny
from xc_ray.engine.kernels.skinny import Tile
from xc_ray.model.decoder import Decoder
from xc_ray.model.weights import Checkpoint

VOCAB = 1024


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model's products of few rows take the kernels that the 7B model's take."""
    vector, matrix = Tile("vector", 4, 256, 1, 4), Tile("matrix", 32, 64, 3, 4)
    split = Tile("matrix", 64, 128, 3, 4, split_k=2)
    for n, k in ((512, 256), (256, 256), (1024, 256), (256, 512), (VOCAB, 256)):
        usual = matrix if n > 256 else split
        for rows in (1, 2, 4, 8):
            monkeypatch.setitem(skinny.TILES, (n, k, rows), vector if rows == 1 else usual)


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Decoder]:
    """A small decoder whose sizes the tensor cores' kernels take: width 256, heads of 64."""
    tiny = tiny_config("2.5")
    d = replace(
        tiny.decoder,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("model")
    save_random(folder, replace(tiny, decoder=d))

    def load(device: str, dtype: torch.dtype) -> Decoder:
        decoder = Checkpoint.open(folder).load_decoder(device=device, dtype=dtype)
        # Random layers of the tiny models hardly differ from the identity; these do.
        for name, weight in decoder.named_parameters():
            if weight.ndim == 2 and "embeddings" not in name:
                weight.data *= 2.5
        return decoder

    return load
