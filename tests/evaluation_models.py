"""Models to evaluate: a random Llama with a byte-level tokenizer, and stories260K where its files are present."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from osp.config import from_dict
from osp.evaluation.language_model import LanguageModel, open_model
from tests.conftest import made_text
from tests.hf_models import STORIES, edit_json, random_llama, write_stories260k

VOCABULARY = 300


@pytest.fixture(scope="session")
def averaged_run(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that averages its weights with the factor 0.6, and has a checkpoint of each step; to read only."""
    from osp.train.setup import train

    folder = tmp_path_factory.mktemp("averaged") / "run"
    values = {**tiny_values, "average": {"kind": "ema", "decay": 0.6}, "run": {"name": "run", "dir": str(folder)}}
    values |= {"checkpoint": {"every": 1, "keep_last": 0}, "eval": {"every": 0, "tokens": 512, "sample_tokens": 0}}
    train(from_dict({**values, "train": {**tiny_values["train"], "steps": 4}}))
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face folder with a random model of 64 positions and a BPE tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder, vocab_size=VOCABULARY)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        made_text(50),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, bos_token_id=0, eos_token_id=0)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LanguageModel:
    return open_model(llama_folder)


@pytest.fixture
def overflowing(llama: LanguageModel) -> LanguageModel:
    """Return `llama` with finite weights whose activations overflow."""
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.down_proj.weight").fill_(1e38)
    return dataclasses.replace(llama, model=model)


@pytest.fixture(scope="session")
def transformers_llama(llama_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder).double().eval()


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    if not STORIES.exists():
        pytest.skip("the shared checkpoint is not here")
    folder = tmp_path_factory.mktemp("stories")
    write_stories260k(folder)
    return open_model(folder)
