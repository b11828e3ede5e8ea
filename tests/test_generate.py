"""Generation against an explicit loop, and against a model whose distribution is known."""

import typing

import pytest
import torch
from torch import Tensor

from osp.config import ModelConfig
from osp.generate import generate
from osp.model import Transformer, build_model

SHAPE = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.6,
)
PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(SHAPE, seed=0)


class FixedModel:
    """Logits (0, 1, 2) whatever the input, whose lengths it records."""

    def __init__(self) -> None:
        self.inputs: list[list[int]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.inputs.append(ids[0].tolist())
        return torch.arange(3.0).expand(1, ids.shape[1], 3)


def test_greedy_equals_an_argmax_loop(model: Transformer) -> None:
    ids = PROMPT.tolist()
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    text = generate(model, PROMPT, 12, context=32, temperature=0.0, seed=0)
    assert len(set(ids)) > 5, "a text that repeats one token would prove little"
    assert text.dtype == torch.int64
    assert text.tolist() == ids[len(PROMPT) :]
    assert PROMPT.tolist() == [3, 1, 4, 1, 5]


def test_greedy_does_not_depend_on_the_seed(model: Transformer) -> None:
    first, second = (generate(model, PROMPT, 8, context=32, temperature=0.0, seed=seed) for seed in (1, 2))
    assert torch.equal(first, second)


def test_temperature_is_reproducible_by_seed(model: Transformer) -> None:
    torch.manual_seed(0)
    first = generate(model, PROMPT, 16, context=32, temperature=1.0, seed=7)
    torch.manual_seed(1)
    assert torch.equal(first, generate(model, PROMPT, 16, context=32, temperature=1.0, seed=7))
    assert not torch.equal(first, generate(model, PROMPT, 16, context=32, temperature=1.0, seed=8))


def test_sampling_leaves_the_global_generator_alone(model: Transformer) -> None:
    before = torch.get_rng_state()
    generate(model, PROMPT, 3, context=32, temperature=1.0, seed=7)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_softmax_of_logits_over_temperature(temperature: float) -> None:
    draws = 2000
    fixed = typing.cast(Transformer, FixedModel())
    text = generate(fixed, torch.tensor([0]), draws, context=4, temperature=temperature, seed=0)
    expected = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).div(temperature).exp()
    expected /= expected.sum()
    deviation = (expected * (1 - expected) / draws).sqrt()
    frequency = torch.bincount(text, minlength=3) / draws
    assert ((frequency - expected).abs() < 4 * deviation).all(), (frequency, expected)


def test_only_the_last_context_tokens_are_read() -> None:
    fixed = FixedModel()
    generate(typing.cast(Transformer, fixed), PROMPT, 3, context=4, temperature=0.0, seed=0)
    assert fixed.inputs == [[1, 4, 1, 5], [4, 1, 5, 2], [1, 5, 2, 2]]


def test_prompt_shorter_than_the_context_grows() -> None:
    fixed = FixedModel()
    generate(typing.cast(Transformer, fixed), torch.tensor([0]), 4, context=3, temperature=0.0, seed=0)
    assert fixed.inputs == [[0], [0, 2], [0, 2, 2], [2, 2, 2]]


def test_no_tokens_wanted_gives_none(model: Transformer) -> None:
    assert generate(model, PROMPT, 0, context=8, temperature=1.0, seed=0).shape == (0,)
