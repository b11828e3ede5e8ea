"""Generation with a cache against the model's own forward without one, in float64; sampling against closed forms."""

import dataclasses
import itertools
import typing

import pytest
import torch
from torch import Tensor

from osp.errors import UserError
from osp.model.generate import Decoder, Sampling, choose, generate, prepare_for_generation, stream
from osp.model.norms import NORMS
from osp.model.transformer import Block, Output, Transformer, build_model
from osp.model_config import AttentionConfig, ModelConfig, NormConfig
from osp.quant.apply import quantized
from osp.quant.spec import QuantSpec

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
BHYT = NormConfig(name="bhyt", seq_len=16)


def shape(norm: NormConfig | str = "ssnorm", **changes: typing.Any) -> ModelConfig:
    return ModelConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "initializer_range": 0.6,
            "norm": NormConfig(name=norm) if isinstance(norm, str) else norm,
            **changes,
        }
    )


CASES = {
    **{f"{name}-mha": shape(BHYT if name == "bhyt" else name) for name in NORMS},
    **{f"{name}-gqa": shape(BHYT if name == "bhyt" else name, num_key_value_heads=2) for name in NORMS},
    "final": shape(dataclasses.replace(BHYT, final="bhyt")),
    "peri": shape(NormConfig(name="bhyt_star", placement="peri")),
    "lns": shape(NormConfig(name="bhyt", lns=True, seq_len=16)),
    "embed_scale": shape(NormConfig(name="dyt", embed_scale=True)),
    "biases": shape("rmsnorm", attention_bias=True, mlp_bias=True),
    "osp": shape(embed_proj=True, qk_norm=True, head_bias=True, num_key_value_heads=1),
    "gate": shape("layernorm", attention=dataclasses.replace(shape().attention, gate=True)),
    "past the paper": shape(ffn_norm=True, hidden_act="sigmoid", attention=AttentionConfig(off_by_one=True)),
    "cap and value gate": shape(attention=AttentionConfig(logit_cap=0.5, value_gate=True, v_scale=0.5)),
}


def lively(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """Return a random model in eval mode. Gains and biases are random too, because ones and zeros hide mistakes."""
    model = build_model(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "embed_tokens" not in name:
            parameter.data += 0.4 * torch.rand(parameter.shape, generator=generator)
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    model.refresh_norms()
    model.compute_dtype = dtype
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return prepare_for_generation(lively(shape()), torch.float64)


@pytest.mark.parametrize("prepared", [False, True], ids=["as trained", "prepared"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_logits_and_greedy_text_equal_uncached_ones(case: str, prepared: bool) -> None:
    """A batch of prompts of different lengths against a forward pass of each prompt by itself without a cache."""
    trained, model = lively(CASES[case]), lively(CASES[case])
    if prepared:
        prepare_for_generation(model, torch.float64)
    texts = [list(prompt) for prompt in PROMPTS]
    decoder = Decoder(model, len(texts), max(map(len, texts)) + 10)
    logits = [decoder.read(texts)]
    for _ in range(9):
        tokens = logits[-1].argmax(-1)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits.append(decoder.read_next(tokens))
    assert len({tuple(text[-6:]) for text in texts}) == 3, "texts that repeat each other would prove little"
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        expected = trained(torch.tensor([text])).logits[0, len(prompt) - 1 :]
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.stack(logits)[:, row], expected, rtol=0, atol=1e-10)
        assert text[len(prompt) :] == expected[:-1].argmax(-1).tolist()
    assert generate(model, PROMPTS, 9) == [text[len(prompt) :] for prompt, text in zip(PROMPTS, texts, strict=True)]


FOLDED = [case for case, config in CASES.items() if not config.embed_proj]  # absorbing them rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FOLDED)
@torch.no_grad()
def test_preparation_is_bit_identical(case: str, dtype: torch.dtype) -> None:
    ids = torch.tensor(PROMPTS[2:])
    prepared = prepare_for_generation(lively(CASES[case], dtype), dtype)
    assert torch.equal(prepared(ids).logits, lively(CASES[case], dtype)(ids).logits)


def test_cache_is_allocated_once_in_the_compute_dtype() -> None:
    model = prepare_for_generation(lively(shape(num_key_value_heads=2), torch.float32), torch.bfloat16)
    decoder = Decoder(model, 3, 20)
    assert decoder.cache.keys.shape == decoder.cache.values.shape == (2, 3, 20, 2, 4)
    assert decoder.cache.keys.dtype == torch.bfloat16
    place = decoder.cache.keys.data_ptr()
    first = [decoder.read(PROMPTS), *(decoder.read_next(torch.tensor([1, 2, 3])) for _ in range(12))]
    # a second text in the same memory, whose old contents must have no effect
    again = [decoder.read(PROMPTS), *(decoder.read_next(torch.tensor([1, 2, 3])) for _ in range(12))]
    assert decoder.cache.keys.data_ptr() == place
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_hooks_on_attention_see_all_keys_and_values(model: Transformer) -> None:
    seen: list[tuple[int, ...]] = []
    attend = typing.cast(Block, model.layers[1]).self_attn.attend
    handle = attend.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[1].shape)))
    generate(model, PROMPTS[:1], 3)
    handle.remove()
    assert seen == [(1, 5, 4, 4), (1, 6, 4, 4), (1, 7, 4, 4)]


@torch.no_grad()
def test_few_widths_of_the_cache_change_only_rounding() -> None:
    """On a GPU a pass reads a multiple of 64 slots, or all. Logits and text equal passes without a cache."""
    model = lively(shape(max_position_embeddings=160, num_key_value_heads=2))
    assert Decoder(model, 1, 140).multiple == 1, "a CPU plans nothing"
    decoder = Decoder(model, 2, 140)
    decoder.multiple = 64
    widths, texts, logits = [], [list(prompt) for prompt in PROMPTS[:2]], [decoder.read(PROMPTS[:2])]
    for _ in range(134):
        for text, row in zip(texts, logits[-1], strict=True):
            text.append(int(row.argmax()))
        logits.append(decoder.read_next(torch.tensor([text[-1] for text in texts])))
        widths.append(decoder.cache.width)
    assert widths == [*([64] * 59), *([128] * 64), *([140] * 11)]  # 6, 7, ... of 140 slots are in use
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=False)):
        expected = model(torch.tensor([text])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack(logits)[:, row], expected, rtol=0, atol=1e-10)
        assert len(set(text[-20:])) > 3, "a text that repeats itself would prove little"
    with quantized(model, QuantSpec(w_bits=4, a_bits=4, kv_bits=4)):  # slots that are not in use change no range
        narrow, wide = Decoder(model, 1, 140), Decoder(model, 1, 140)
        wide.multiple = 64
        for decoder in (narrow, wide):
            decoder.read(PROMPTS[:1])
        for token in (2, 7, 1, 8):
            rows = (decoder.read_next(torch.tensor([token])) for decoder in (narrow, wide))
            torch.testing.assert_close(*rows, rtol=0, atol=1e-10)


@torch.no_grad()
def test_quantized_model_generates_the_argmax_of_its_forward_pass() -> None:
    model = lively(shape(), torch.float32)
    with quantized(model, QuantSpec(w_bits=4, a_bits=4, kv_bits=4)):
        ((*text,),) = generate(model, PROMPTS[:1], 8)
        expected = model(torch.tensor([[*PROMPTS[0], *text]])).logits[0, 4:-1].argmax(-1)
    assert text == expected.tolist()


@pytest.mark.slow
def test_compiled_text_equals_eager_text() -> None:
    model = prepare_for_generation(lively(shape(BHYT, num_key_value_heads=2)), torch.float64)
    assert generate(model, PROMPTS, 12, compile=True) == generate(model, PROMPTS, 12)


# --- sampling -----------------------------------------------------------------------------------------------------


class FixedModel(Transformer):
    """A model that returns the same logits at every position for every input."""

    def __init__(self, logits: Tensor):
        super().__init__(shape(vocab_size=len(logits)))
        self.logits = logits

    def forward(self, input_ids: Tensor, *_: typing.Any, **__: typing.Any) -> Output:
        return Output(None, self.logits.expand(len(input_ids), 1, -1), None)


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.7, -3.0])


def closed_form(temperature: float, kept: list[int]) -> Tensor:
    """Return the probabilities of all tokens if only the tokens `kept` remain."""
    weights = torch.zeros(6, dtype=torch.float64)
    weights[kept] = (LOGITS.double()[kept] / temperature).exp()
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        # probabilities at temperature 1, falling: token 1 0.510, 3 0.229, 4 0.139, ...
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=2.0, top_k=3), [1, 3, 4]),
        (Sampling(temperature=1.0, top_k=100), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_p=0.1), [1]),
        (Sampling(temperature=1.0, top_p=0.73), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.75), [1, 3, 4]),
        # after top_k=3 the largest two hold 0.842
        (Sampling(temperature=1.0, top_k=3, top_p=0.84), [1, 3]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.86), [1, 3, 4]),
    ],
)
def test_sampling_equals_the_closed_form(sampling: Sampling, kept: list[int]) -> None:
    """A grid of quantiles gives the distribution up to one step of the grid per token."""
    grid = 1000
    actual = [choose(LOGITS[None], sampling, (i + 0.5) / grid).item() for i in range(grid)]
    frequency = torch.bincount(torch.tensor(actual), minlength=6) / grid
    torch.testing.assert_close(frequency.double(), closed_form(sampling.temperature, kept), rtol=0, atol=1.01 / grid)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_choice_at_extreme_quantiles(uniform: float) -> None:
    """The first and last quantile choose kept tokens; close to temperature 0 they choose the most likely one."""
    logits = torch.tensor([[1e4, -1e4, 9e3], [-1e30, 0.0, 1.0]])
    assert choose(logits, Sampling(temperature=1e-300), uniform).tolist() == [0, 2]
    assert choose(logits, Sampling(temperature=1.0, top_k=1), uniform).tolist() == [0, 2]
    assert choose(logits, Sampling(temperature=1.0, top_p=1e-9), uniform).tolist() == [0, 2]
    assert choose(logits, Sampling(temperature=1.0), uniform)[1] != 0
    uniform_logits = torch.zeros(1, 7)
    assert choose(uniform_logits, Sampling(temperature=1.0), uniform).item() == int(uniform * 7)


def test_random_numbers_are_uniform_and_independent() -> None:
    """Frequencies of tokens and of consecutive pairs in one long text of a known distribution."""
    model = FixedModel(torch.tensor([0.0, 1.0, 2.0]))
    model.config = dataclasses.replace(model.config, max_position_embeddings=5000)
    (text,) = generate(model, [[0]], 3000, sampling=Sampling(temperature=1.0, seed=0))
    single = torch.tensor([0.0, 1.0, 2.0]).double().softmax(-1)
    for expected, actual in (
        (single, torch.bincount(torch.tensor(text), minlength=3) / 3000),
        (
            torch.outer(single, single).flatten(),
            torch.bincount(torch.tensor([3 * a + b for a, b in itertools.pairwise(text)]), minlength=9) / 2999,
        ),
    ):
        deviation = (expected * (1 - expected) / 3000).sqrt()
        assert ((actual - expected).abs() < 4 * deviation).all(), (actual, expected)


def test_same_seed_gives_the_same_text(model: Transformer) -> None:
    def text(seed: int, length: int = 16, temperature: float = 1.0) -> list[int]:
        return generate(model, PROMPTS[:1], length, sampling=Sampling(temperature=temperature, seed=seed))[0]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = text(7)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not ours to use"
    torch.manual_seed(1)
    assert text(7) == first != text(8)
    assert text(7, 5) == first[:5]
    assert text(1, temperature=0.0) == text(2, temperature=0.0)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_k=20, top_p=0.95, seed=3)], ids=str)
def test_text_does_not_depend_on_the_batch(model: Transformer, sampling: Sampling) -> None:
    separate = [generate(model, [prompt], 15, sampling=sampling)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, 15, sampling=sampling) == separate
    assert generate(model, PROMPTS[::-1] + PROMPTS[:1], 15, sampling=sampling) == [*separate[::-1], separate[0]]


def test_end_of_text_stops_only_its_sequence(model: Transformer) -> None:
    free = generate(model, PROMPTS, 12)
    end = free[0][3]
    assert end not in free[0][:3] + free[2], "choose another seed"
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert generate(model, PROMPTS, 12, eos_ids=[end]) == expected
    steps = list(stream(model, PROMPTS, 12, eos_ids=[end]))
    assert [tokens[0] for tokens in steps] == [*expected[0], *[None] * 8]
    assert len(list(stream(model, PROMPTS[:1], 12, eos_ids=[end]))) == 4, "nothing is computed when all have ended"


def test_generation_of_zero_and_the_maximum_number_of_tokens(model: Transformer) -> None:
    assert generate(model, PROMPTS, 0) == [[], [], []]
    assert [len(row) for row in generate(model, PROMPTS, 1)] == [1, 1, 1]
    assert [len(row) for row in generate(model, PROMPTS, 24)] == [24, 24, 24], "8 + 24 are all positions of the model"


@pytest.mark.parametrize(
    ("prompts", "num_tokens", "message"),
    [
        ([[1], []], 3, r"prompt 2 is empty"),
        ([[1], [1] * 32], 1, r"prompt 2 is 32 tokens long and the model has 32 positions"),
        ([[1] * 30], 3, r"max_new_tokens=3 after the 30 tokens of prompt 1 .* 32 positions; set max_new_tokens=2"),
    ],
    ids=["empty", "long prompt", "long text"],
)
def test_prompts_that_do_not_fit_are_refused(
    model: Transformer, prompts: list[list[int]], num_tokens: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, num_tokens)
