"""The README is correct: each command composes, make targets and files exist, the Python example runs."""

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import entry
import pytest

from osp.config import Config
from osp.errors import UserError
from osp.model.build_norms import build_norm
from osp.model.norms import NORMS
from osp.train.setup import train
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:deepspeed|torchrun|python|sbatch) [^\n#]*scripts/[^\n#]*", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script and the overrides of each command give a valid configuration."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    assert (ROOT / words[script]).exists()
    program = words[script].replace("slurm.sh", "train.py")  # slurm.sh passes its overrides on
    printed = {
        "train.py": "num_hidden_layers:",
        "verify_resume.py": "num_hidden_layers:",
        "plan.py": "world_size:",
        "evaluate.py": "ablate:",
        "compare.py": "paths:",
        "export.py": "out: exported",
        "generate.py": "max_new_tokens:",
        "convert.py": "out: converted",
        "ablation.py": "seeds:",
        "inspect_outliers.py": "text:",
        "report.py": "paths:",
        "panels.py": "project:",
    }
    if key := printed.get(Path(program).name):
        monkeypatch.setattr(sys, "argv", [program, *words[script + 1 :], "--cfg", "job"])
        monkeypatch.setattr(entry, "launch", entry.run)  # `launch` would end this process
        runpy.run_path(str(ROOT / program), run_name="__main__")
        assert key in capsys.readouterr().out


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/LOG.md"])
def test_files_named_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:osp|scripts|tests|benchmarks|docs)/[\w/]+\.\w+", text))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_files_named_in_configurations_exist() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        named = re.findall(r"\b(?:osp|scripts|configs)/[\w/]+\.py", path.read_text(encoding="utf-8"))
        assert not [name for name in named if not (ROOT / name).exists()], path


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("target", re.findall(r"^    make ([\w-]+)", README, flags=re.MULTILINE))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_ci_runs_the_readmes_test_command() -> None:
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test " in README


def test_python_example_runs(tiny: Callable[..., Config], tmp_path: Path) -> None:
    import torch

    train(tiny("train.steps=1"))
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    exec(code.replace("runs/quickstart", str(tmp_path / "run")), names)
    assert names["logits"].shape == (1, 3, 320)


def test_every_group_and_choice_of_the_table_exists() -> None:
    for group, choices in re.findall(r"^\| `\+?(\w+)=` \| (.*) \|$", README, flags=re.MULTILINE):
        existing = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}
        named = set(re.findall(r"`(\w+)`", choices)) - {"100"}
        assert named & existing == existing, (group, existing - named)


def test_table_of_normalizers_lists_every_choice_and_its_options() -> None:
    """The table has every name in configs/norm, three more switches, and the options of each class."""
    rows = re.findall(r"^\| `([\w.]+)=(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", README, flags=re.MULTILINE)
    choices = [value for key, value, _, _ in rows if key == "norm"]
    assert sorted(choices) == sorted(path.stem for path in (ROOT / "configs" / "norm").glob("*.yaml"))
    assert {key for key, value, _, _ in rows if key != "norm"} == {"qk_norm", "attention.gate", "recentre"}
    for key, name, options, exported in rows:
        assert exported.split()[0].rstrip(":") in ("yes", "no", "after", "as"), name
        if key == "norm" and name in NORMS:
            with pytest.raises(UserError) as caught:
                build_norm(name, 8, no_such_option=1)
            assert str(sorted(re.findall(r"`(\w+)`", options))) in str(caught.value), name
