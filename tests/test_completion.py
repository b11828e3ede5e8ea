"""`python scripts/generate.py`: text on stdout, speed on stderr, and one line for a user error."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import entry
import generate as script_module
import pytest
import torch
from generate import GenerateConfig, Texts, TextStream, choose_dtype
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from osp.convert.hf_export import write_llama
from osp.evaluation.language_model import open_model
from osp.model.generate import generate
from osp.model.hf_llama import load_hf
from osp.model.transformer import build_model
from osp.model_config import ModelConfig, NormConfig

Outcome = tuple[int, str, str]  # exit status, stdout, stderr


def tokenizer() -> Tokenizer:
    """Return a byte tokenizer whose id 0 is EOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<eos>": 0} | {letter: i for i, letter in enumerate(letters, start=1)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Hugging Face Llama over bytes."""
    folder = tmp_path_factory.mktemp("llama")
    config = ModelConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.5,
        norm=NormConfig(name="rmsnorm"),
    )
    write_llama(build_model(config, seed=1), folder, dtype="fp32", bos_id=0, eos_id=0)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Run `python scripts/generate.py ARGUMENTS` on one CPU thread."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        status = 0
        try:
            entry.run(
                script_module.main,
                "generate",
                defaults={**dataclasses.asdict(GenerateConfig()), "arguments": []},
                positional="arguments",
            )
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_cpu_generates_in_fp32_by_default() -> None:
    """bf16 rounds differently by batch size, so a seed would not determine the text."""
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16


CPU = ("device=cpu", "dtype=fp32", "threads=1")


def expected_text(llama: Path, prompt: str, num_tokens: int) -> str:
    """Return the prompt and its greedy continuation up to EOS."""
    ids = [0, *tokenizer().encode(prompt).ids]
    (new,) = generate(load_hf(llama), [ids], num_tokens, eos_ids=[0])
    return tokenizer().decode([*ids, *new])


def test_stdout_holds_only_the_text(script: Callable[..., Outcome], llama: Path) -> None:
    status, out, err = script(str(llama), "so = it's \\ {${x}}\n-", "max_new_tokens=12", "temperature=0", *CPU)
    assert status == 0, err
    assert out == expected_text(llama, "so = it's \\ {${x}}\n-", 12) + "\n"
    assert len(out) > 20
    (line,) = err.strip().split("\n")
    assert "21 tokens read in" in line
    assert "tokens/s" in line


def test_averaged_weights_continue_a_text(script: Callable[..., Outcome], averaged_run: Path) -> None:
    written = {}
    for weights in ("trained", "averaged"):
        subject = open_model(averaged_run, weights=weights)
        ids = [subject.begin_id, *subject.encode("abc")]
        (new,) = generate(subject.model, [ids], 24, eos_ids=subject.stop_ids)
        keys = ("max_new_tokens=24", "temperature=0", f"weights={weights}", *CPU)
        status, written[weights], err = script(str(averaged_run), "abc", *keys)
        assert status == 0, err
        assert written[weights] == subject.tokenizer.decode(ids + new) + "\n"
    assert written["trained"] != written["averaged"]


def test_prompts_come_from_arguments_and_file(script: Callable[..., Outcome], llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("x = 1\n\nna\u00efve\n", encoding="utf-8")
    status, out, _ = script(
        str(llama), "A long prompt", "b", "prompts=prompts.txt", "max_new_tokens=9", "temperature=0", *CPU
    )
    assert status == 0
    texts = [expected_text(llama, prompt, 9) for prompt in ("A long prompt", "b", "x = 1", "na\u00efve")]
    assert out == "\n\n".join(texts) + "\n"


def test_default_length_fills_the_positions(script: Callable[..., Outcome], llama: Path) -> None:
    _, out, _ = script(str(llama), "abc", "temperature=0", "bos=false", *CPU)
    (new,) = generate(load_hf(llama), [tokenizer().encode("abc").ids], 37, eos_ids=[0])
    assert out == "abc" + tokenizer().decode(new) + "\n"


def test_seed_and_sampling_reach_the_model(script: Callable[..., Outcome], llama: Path) -> None:
    def text(*overrides: str) -> str:
        status, out, err = script(str(llama), "abc", "max_new_tokens=20", *CPU, *overrides)
        assert status == 0, err
        return out

    assert text("seed=1") == text("seed=1") != text("seed=2")
    greedy = text("temperature=0")
    assert text("top_k=1") == text("top_p=1e-9") == text("temperature=1e-9") == greedy != text("temperature=1.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'name the model and a prompt: python scripts/generate.py MODEL "Once upon a time"'),
        (["LLAMA"], "name the model and a prompt"),
        (["nowhere", "a"], "nowhere: no model; name a run with a checkpoint"),
        (["LLAMA", ""], "prompt 1 is empty; give it some text"),
        (["LLAMA", "a", ""], "prompt 2 is empty"),
        (["LLAMA", "\udcff"], "prompt 1 is not UTF-8 text"),
        (["LLAMA", "a" * 39], "prompt 1 is 40 tokens long and the model has 40 positions"),
        (
            ["LLAMA", "a", "max_new_tokens=39"],
            "39 after the 2 tokens of prompt 1 .* 40 positions; set max_new_tokens=38",
        ),
        (["LLAMA", "a", "max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
        (["LLAMA", "a", "top_p=0"], r"top_p=0: must be above 0"),
        (["LLAMA", "a", "top_p=1.5"], r"top_p=1.5: must be at most 1"),
        (["LLAMA", "a", "top_k=0"], "top_k=0: must be at least 1"),
        (["LLAMA", "a", "temperature=-1"], "temperature=-1: must be at least 0"),
        (["LLAMA", "a", "temperatur=1"], "unknown key 'temperatur'; did you mean 'temperature'"),
        (["LLAMA", "prompts=nowhere.txt"], "prompts=nowhere.txt does not exist"),
        (["LLAMA", "prompts=empty.txt"], "prompts=empty.txt holds no prompt; write one per line"),
        (["LLAMA", "a", "device=tpu"], "device='tpu': must be 'auto', 'cpu' or 'cuda'"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode()[:40] if isinstance(value, list) else "",
)
def test_mistake_is_one_line(
    arguments: list[str], message: str, script: Callable[..., Outcome], llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    status, out, err = script(*(str(llama) if argument == "LLAMA" else argument for argument in arguments))
    assert (status, out) == (2, "")
    (line,) = err.strip().split("\n")
    assert line.startswith("error: ")
    assert re.search(message, line), line


def test_texts_are_streamed_in_the_order_of_the_prompts() -> None:
    pieces: list[str] = []
    ids = tokenizer().encode("abcd\u20ac").ids
    a, b, c, d, *euro = ids
    texts = Texts(["<", "[", "("], [TextStream(tokenizer()) for _ in range(3)], 0, pieces.append)
    texts.push([a, c, euro[0]])
    assert pieces == ["<a"]
    texts.push([b, 0, euro[1]])
    texts.push([0, None, euro[2]])
    assert pieces == ["<a", "b", "\n\n", "[c\n\n", "(\u20ac"]
    texts.push([None, None, d])
    texts.push([None, None, euro[0]])
    texts.finish()
    assert "".join(pieces) == "<ab\n\n[c\n\n(\u20acd\ufffd\n"


def sentencepiece_like() -> Tokenizer:
    """Words begin with U+2581, and the decoder removes the first one; other characters are bytes such as <0xE2>."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefgh"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("made", [tokenizer(), sentencepiece_like()], ids=["bytes", "sentencepiece"])
def test_streamed_text_consists_of_whole_characters(made: Tokenizer) -> None:
    text = "ab cd\u00e9 \u20ac\U0001f600 \u4f60\u597d e\u0301fg ha"
    ids = made.encode(text).ids
    assert made.decode(ids) == text
    for cut in (0, 1, 4):
        texts = TextStream(made, ids[:cut])
        pieces = [texts.push(token) for token in ids[cut:]]
        assert "".join(pieces) == text.removeprefix(made.decode(ids[:cut]))
        assert "\U0001f600" in pieces, "four tokens, one piece"
        assert texts.finish() == ""


def test_incomplete_character_becomes_a_replacement_character() -> None:
    made = tokenizer()
    ids = made.encode("a\U0001f600").ids
    texts = TextStream(made)
    assert [texts.push(token) for token in ids[:3]] == ["a", "", ""]
    assert texts.finish() == "\ufffd"
    # a wrong byte does not hold back what follows it
    texts = TextStream(made)
    assert "".join(texts.push(token) for token in [ids[1], ids[0], ids[0]]) == "\ufffdaa"
