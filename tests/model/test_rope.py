from dataclasses import replace

import pytest
import torch

from tests.reference import rope as reference
from xc_ray.demo.make import tiny_config
from xc_ray.model.config import DecoderConfig, RopeScaling
from xc_ray.model.rope import inverse_frequencies, rope_base, rope_table, rotate

LIMIT = 100
PLAIN = replace(tiny_config("2.5").decoder, max_position_embeddings=LIMIT, rope_scaling=None)
SCALINGS = {
    "null": None,
    "linear": RopeScaling("linear", 4.0),
    "dynamic 1": RopeScaling("dynamic", 1.0),
    "dynamic 2": RopeScaling("dynamic", 2.0),
}
CONFIGS = {name: replace(PLAIN, rope_scaling=s) for name, s in SCALINGS.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("length", [1, LIMIT, LIMIT + 1, 3 * LIMIT])
def test_vectors_are_turned_as_in_the_textbook(config: DecoderConfig, length: int) -> None:
    x = torch.randn(length, 2, config.head_dim, dtype=torch.float64)
    frequencies = inverse_frequencies(config, length, dtype=torch.float64)
    turned = rotate(x, *rope_table(torch.arange(length), frequencies))
    angles = reference.frequencies(config, length)
    for position in {0, 1, length // 2, length - 1} & set(range(length)):
        for head in range(2):
            expected = reference.rotated(x[position, head].tolist(), position, angles)
            assert turned[position, head].tolist() == pytest.approx(expected, abs=1e-9)


def test_float32_frequencies_are_those_of_float64() -> None:
    for config in CONFIGS.values():
        exact = inverse_frequencies(config, 250, dtype=torch.float64)
        torch.testing.assert_close(
            inverse_frequencies(config, 250).double(), exact, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", ["null", "linear"])
def test_only_dynamic_scaling_knows_a_length(name: str) -> None:
    short, long = (inverse_frequencies(CONFIGS[name], n) for n in (10, 10 * LIMIT))
    assert torch.equal(short, long)


@pytest.mark.parametrize("name", ["dynamic 1", "dynamic 2"])
def test_dynamic_scaling_begins_past_the_limit(name: str) -> None:
    config = CONFIGS[name]
    for length in (1, LIMIT - 1, LIMIT):
        assert rope_base(config, length) == config.rope_theta
    assert rope_base(config, LIMIT + 1) > config.rope_theta


def test_the_base_at_twice_the_limit() -> None:
    # d = 8: theta · (factor · 2 − (factor − 1))^(8 / 6)
    assert PLAIN.head_dim == 8
    assert rope_base(CONFIGS["dynamic 1"], 2 * LIMIT) == pytest.approx(1e6 * 2 ** (4 / 3))
    assert rope_base(CONFIGS["dynamic 2"], 2 * LIMIT) == pytest.approx(1e6 * 3 ** (4 / 3))


def test_linear_scaling_divides_positions() -> None:
    x = torch.randn(3, 1, 8, dtype=torch.float64)
    plain, scaled = (
        inverse_frequencies(CONFIGS[n], 9, dtype=torch.float64) for n in ("null", "linear")
    )
    near = rotate(x, *rope_table(torch.tensor([0, 1, 2]), plain))
    far = rotate(x, *rope_table(torch.tensor([0, 4, 8]), scaled))
    torch.testing.assert_close(near, far)


def test_angles_do_not_depend_on_what_was_asked_before() -> None:
    config = CONFIGS["dynamic 2"]
    before = inverse_frequencies(config, 50)
    inverse_frequencies(config, 100 * LIMIT)
    assert torch.equal(inverse_frequencies(config, 50), before)


def test_each_row_may_have_frequencies_of_its_own() -> None:
    config = CONFIGS["dynamic 2"]
    short, long = inverse_frequencies(config, 10), inverse_frequencies(config, 500)
    positions = torch.tensor([3, 400])
    cos, sin = rope_table(positions, torch.stack([short, long]))
    for row, frequencies in enumerate((short, long)):
        one_cos, one_sin = rope_table(positions[row : row + 1], frequencies)
        assert torch.equal(cos[row], one_cos[0])
        assert torch.equal(sin[row], one_sin[0])


def test_turning_keeps_lengths_and_position_0_turns_nothing() -> None:
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    frequencies = inverse_frequencies(CONFIGS["null"], 5, dtype=torch.float64)
    turned = rotate(x, *rope_table(torch.arange(5), frequencies))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0])
