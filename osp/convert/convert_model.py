"""`scripts/convert.py`: a model with other norms that computes the same, as a folder that every other script reads.

    OUT/config.yaml       the configuration: the run's, with another model
        tokenizer.json
        checkpoints/      one, of weights alone: where training begins with checkpoint.init_from=OUT
        certificate.json  see osp.convert.same_function

The folder gets its name when all of this is in it and the certificate holds.
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from osp.config import Config, DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig, to_dict
from osp.convert.change_norm import conversion_steps, convert, converted_config
from osp.convert.same_function import FILE_NAME, Certificate, certify, read_certificate
from osp.errors import UserError
from osp.evaluation.language_model import LanguageModel, open_model
from osp.evaluation.texts import read_text
from osp.files import new_folder, write_text
from osp.model.hf_llama import TOKENIZER
from osp.model.transformer import Transformer
from osp.run.checkpoint import Saver, whole_parameters


def convert_model(
    path: str | Path, out: str | Path, *, to: str, text: str = "held_out", device: torch.device | str = "cpu"
) -> Certificate:
    """Write the model at `path` (a run, a checkpoint, a Hugging Face folder) with the norms `to` to the folder `out`.

    text: the name of the text that both models are compared on (`osp.evaluation.texts`). Raises `UserError` if there is
    no such model, or what was made is not exact enough; then nothing is left behind.
    """
    out = Path(out)
    with new_folder(out) as folder:
        subject = open_model(path, device=device)
        converted_config(subject.model.config, to)  # what cannot be converted is said before a text is read
        if subject.conversion is not None:
            read_certificate(subject)
        if subject.eos_id is None or subject.tokenizer.id_to_token(subject.eos_id) is None:
            raise UserError(f"{path}: config.json names no eos_token_id, or not one of the tokenizer's; mend it there")
        tokens = read_text(text, subject)
        steps = conversion_steps(subject.model.config, to)
        exact = convert(subject.model, to)
        stored = copy.deepcopy(exact).float()
        stored.compute_dtype = torch.float32
        certificate = certify(subject, exact, stored, tokens, steps=steps, path=out)
        _write(folder, subject, stored, _config_of(subject, stored.config, out), steps)
        write_text(folder / FILE_NAME, json.dumps(dataclasses.asdict(certificate), indent=1) + "\n")
    return certificate


def _write(folder: Path, subject: LanguageModel, model: Transformer, config: Config, steps: list[str]) -> None:
    source = subject.run or subject.folder
    write_text(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    step = subject.step or 0
    manifest: dict[str, Any] = {
        "step": step,
        "tokens": step * config.train.tokens_per_step,
        "config": to_dict(config),
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "conversion": {"steps": steps, "bos_id": subject.bos_id},
    }
    saver = Saver(folder / "checkpoints", keep_last=0, keep_every=0, token="convert", rank=0, gather=lambda x: [x])
    saver.begin(whole_parameters(model), rng={}, buffers=dict(model.named_buffers()), manifest=manifest)
    if error := saver.finish().error:
        raise OSError(error)


def _config_of(subject: LanguageModel, model: ModelConfig, out: Path) -> Config:
    """The configuration of the run that trained the model; of a Hugging Face model one that says there is none."""
    run = RunConfig(name=out.name, dir=str(out))
    if subject.config is not None:
        return dataclasses.replace(subject.config, run=run, model=model)
    eos_token = subject.tokenizer.id_to_token(subject.eos_id or 0)
    assert eos_token is not None
    seq_len = min(2048, model.max_position_embeddings)
    return Config(
        run=run,
        model=model,
        train=TrainConfig(steps=1, seq_len=seq_len, tokens_per_step=seq_len),
        data=DataConfig(source="none"),
        tokenizer=TokenizerConfig(train=False, path=str(out / TOKENIZER), eos_token=eos_token),
    )
