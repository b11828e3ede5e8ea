"""README, CONTRIBUTING and the site are correct: commands compose, names exist, examples run, the site builds."""

import ast
import dataclasses
import functools
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import entry
import hydra
import make_reference
import pytest
from omegaconf import OmegaConf

from osp.config import AT_TOP, Config, from_dict, leaves, to_dict
from osp.errors import UserError
from osp.model.build_norms import build_norm
from osp.model.norms import NORMS
from osp.schema import build
from osp.train.setup import train
from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *sorted((ROOT / "benchmarks").glob("*.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
BLOCKS = [
    (page, language, code)
    for page, text in PAGES.items()
    for language, code in re.findall(r"^ *```(\w+).*\n((?:.*\n)*?) *```$", text, flags=re.MULTILINE)
]
GROUPS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir())
FILES = "py|yaml|json|jsonl|md|html|sh|txt|csv|safetensors|gguf|bin|pt|svg|png"  # not the last part of a key
TOGETHER = "\n".join(PAGES.values())


def shell_lines() -> Iterator[tuple[str, str]]:
    """Yield (page, command) for lines of bash blocks, and for commands in running text and in indented blocks."""
    for page, language, code in BLOCKS:
        if language in ("bash", "sh", "shell", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                if command := line.strip().partition(" #")[0].strip():
                    yield page, command
    for page, text in PAGES.items():
        for command in re.findall(r"`((?:deepspeed|torchrun|python|sbatch|make) [^`]+)`", outside_blocks(text)):
            yield page, " ".join(command.split())
        for command in re.findall(
            r"^    ((?:deepspeed|torchrun|python|sbatch|make) [^\n#]+)", text, flags=re.MULTILINE
        ):
            yield page, command.strip()


def outside_blocks(text: str) -> str:
    return re.sub(r"^ *```\w*.*\n(?:.*\n)*? *```$", "", text, flags=re.MULTILINE)


def with_script(command: str) -> str:
    """Return the command behind `make train ARGS="..."`, and other commands as they are."""
    made = re.fullmatch(r"""make train ARGS=(["'])(.*)\1""", command)
    return f"python scripts/train.py +experiment=quickstart {made[2]}" if made else command


COMMANDS = list(dict.fromkeys(with_script(command) for _, command in shell_lines()))
COMMANDS = [command for command in COMMANDS if re.search(r"\bscripts/\w+\.(py|sh)\b", command)]
SPANS = sorted({span for text in PAGES.values() for span in re.findall(r"`([^`\n]+)`", outside_blocks(text))})


# --- commands -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Script:
    """What a script passes to `entry.launch`, and its globals."""

    config_name: str
    defaults: dict[str, Any]
    positional: str | None
    names: dict[str, Any]


@functools.cache
def script(name: str) -> Script:
    """Return how a script starts. Nothing runs: `launch` is replaced while its `__main__` block is executed."""
    launched: dict[str, Any] = {}

    def launch(main: Any, config_name: str = "train", *, defaults: Any = None, positional: str | None = None) -> None:
        launched.update(config_name=config_name, defaults=defaults or to_dict(Config()), positional=positional)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "launch", launch)
        patch.setattr(sys, "argv", [name])
        names = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return Script(names=names, **launched)


@pytest.fixture
def composed() -> Iterator[Callable[[Script, list[str]], dict[str, Any]]]:
    """Return a function that composes the overrides of a script as `entry.run` does."""

    def compose(script: Script, overrides: list[str]) -> dict[str, Any]:
        entry.store_defaults(script.defaults)
        values = OmegaConf.to_container(hydra.compose(script.config_name, overrides=overrides), resolve=True)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}

    with hydra.initialize_config_dir(entry.CONFIGS, version_base="1.3"):
        yield compose


def check(name: str, values: dict[str, Any]) -> None:
    """Build the configuration of a script. Raises `UserError` for a key or value that the script would refuse."""
    cls = make_reference.script_configs()[name]
    if cls is None:
        from_dict(values)
    elif name in ("plan", "verify_resume"):  # a training and more
        own = values.pop("verify") if name == "verify_resume" else None
        options = [field.name for field in dataclasses.fields(cls)]
        build(cls, own or {key: values.pop(key) for key in options if key in values})
        from_dict(values)
    else:
        build(cls, {key: value for key, value in values.items() if key != "arguments"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str, composed: Callable[[Script, list[str]], dict[str, Any]]) -> None:
    """The script exists, and accepts the keys, the values and the choices of the command."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if re.match(r"(\./)?scripts/", word))
    launcher, path, arguments = words[0], ROOT / words[place], words[place + 1 :]
    assert launcher in ("deepspeed", "torchrun", "sbatch", "python", ".venv/bin/python"), command
    assert path.exists(), command
    name = path.stem.replace("slurm", "train")  # slurm.sh passes its overrides on
    if "--cfg" in arguments:
        assert arguments[arguments.index("--cfg") : arguments.index("--cfg") + 2] == ["--cfg", "job"]
        arguments = [argument for argument in arguments if argument not in ("--cfg", "job")]
    arguments = [argument for argument in arguments if argument not in ("--help", "...")]
    started = script(name)
    if started.positional is not None:
        argv, many = [name, *arguments], isinstance(started.defaults[started.positional], list | tuple)
        entry._take_first(argv, started.positional, many=many)
        arguments = argv[1:]
    if name == "ablation":
        training = [argument for argument in arguments if started.names["is_override"](argument)]
        arguments = [argument for argument in arguments if argument not in training]
        check("train", composed(script("train"), training))
    check(name, composed(started, arguments))


def test_every_script_has_a_command() -> None:
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"entry"} <= {
        re.findall(r"scripts/(\w+)", command)[0] for command in COMMANDS
    }


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {(page, command.split()[1]) for page, command in shell_lines() if re.match(r"make [a-z]", command)}
    assert {"train", "test"} <= {target for _, target in named}
    assert not {(page, target) for page, target in named if target not in targets}


def test_ci_runs_the_test_command_of_the_documents() -> None:
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"\bmake test\b", PAGES["README.md"] + PAGES["CONTRIBUTING.md"])


# --- names --------------------------------------------------------------------------------------------------------


def made_up_files(text: str) -> list[str]:
    return re.findall(r"^ *```.*\btitle=\"([^\"]+)\"", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_documents_exist(page: str) -> None:
    """Except files whose name is a placeholder in capitals, and files of an example: the title of a block."""
    text, made_up = PAGES[page], set(made_up_files(PAGES[page]))
    named = set(re.findall(r"(?<![\w/.-])(?:osp|scripts|tests|benchmarks|docs|configs)/[\w/.-]*\.\w+", text))
    named = {name for name in named - made_up if not re.search(r"/[A-Z]+\.(?!md)", name)}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_files_named_in_configurations_exist() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        named = re.findall(r"\b(?:osp|scripts|configs)/[\w/]+\.py", path.read_text(encoding="utf-8"))
        assert not [name for name in named if not (ROOT / name).exists()], path


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/")])
def test_links_of_documents_outside_the_site_exist(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)\s#]+)(?:#[^)]*)?\)", PAGES[page])
    links += re.findall(r"""<(?:img|source|a)\b[^>]*\b(?:src|srcset|href)=["'](?!https?:)([^"'#\s]+)""", PAGES[page])
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


def test_choices_in_running_text_exist() -> None:
    """`norm=bhyt` and so on: the choice of a group is a file of that group. Capitals are placeholders."""
    made_up = {tuple(Path(name).with_suffix("").parts[1:]) for name in made_up_files(TOGETHER)}
    wrong = []
    for span in SPANS:
        for group, choice in re.findall(r"(?:^|(?<=[ +]))(\w+)=(\w+)(?=$|[ |\\])", span):
            if group in GROUPS and not choice.isupper() and (group, choice) not in made_up:
                wrong += [span] * (choice not in choices(group))
    assert not wrong


def choices(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}


def test_keys_in_running_text_exist() -> None:
    """`train.seq_len` and so on: a dotted name that begins with a section is a key, a part of one, or a file."""
    known = set(re.findall(r"^\| `([\w.\[\]]+)` \|", PAGES["docs/configuration.md"], flags=re.MULTILINE))
    sections = {*to_dict(Config()), *AT_TOP, "quant", "verify", "machine", "sweep"}
    named = {
        (span, re.sub(r"\.[A-Z]+$", "", key))  # without a placeholder at the end
        for span in SPANS
        for key in re.findall(r"(?:^|(?<=[ +(]))([a-z_]+(?:\.\w+)+)(?==|$|[ ,)])", span)
        if key.partition(".")[0] in sections and not re.search(rf"\.(?:{FILES})$", key)
    }
    for span, name in sorted(named):
        key = re.sub(r"^monitor\.alerts\.\w+\.\w+", "monitor.alerts.STATISTIC.SITE", name)
        assert key in sections or any(f"{one}.".startswith(f"{key}.") for one in known), span


@pytest.mark.parametrize("page", PAGES)
def test_page_is_finished(page: str) -> None:
    assert not re.findall(r"@@\w*|\bTODO\b|\bTBD\b|\bHERO\b|\bXXX\b|goes here", PAGES[page])
    assert len(PAGES[page]) > 1000


# --- tables -------------------------------------------------------------------------------------------------------


def test_every_group_is_in_a_table_with_all_its_choices() -> None:
    for group, named in re.findall(r"^\| `\+?(\w+)=` \| (`.*) \|$", TOGETHER, flags=re.MULTILINE):
        assert choices(group) <= set(re.findall(r"`(\w+)`", named)), group
    for group in GROUPS:
        rows = set(re.findall(rf"^\| `\+?{group}=(\w+)` \|", PAGES["docs/configuration.md"], flags=re.MULTILINE))
        assert rows == choices(group), group


def test_table_of_normalizers_lists_every_choice_and_its_options() -> None:
    """The table has every name in configs/norm, two more switches, and the options of each class."""
    pattern = r"^\| `([\w.]+)=(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$"
    tables = {page: re.findall(pattern, text, flags=re.MULTILINE) for page, text in PAGES.items()}
    tables = {page: [row for row in rows if not row[1].isupper()] for page, rows in tables.items()}  # NAME: the head
    tables = {page: rows for page, rows in tables.items() if any(key == "norm" for key, _, _, _ in rows)}
    assert tables, "no page has the table of normalizers"
    for page, rows in tables.items():
        assert sorted(value for key, value, _, _ in rows if key == "norm") == sorted(choices("norm")), page
        assert {key for key, _, _, _ in rows if key != "norm"} == {"qk_norm", "attention.gate"}
        for key, name, options, exported in rows:
            assert exported.split()[0].rstrip(":") in ("yes", "no", "after", "as"), name
            if key == "norm" and name in NORMS:
                with pytest.raises(UserError) as caught:
                    build_norm(name, 8, no_such_option=1)
                assert str(sorted(re.findall(r"`(\w+)`", options))) in str(caught.value), name


# --- Python -------------------------------------------------------------------------------------------------------


PYTHON = [(page, code) for page, language, code in BLOCKS if language == "python"]


def test_python_examples_on_the_quickstart_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Every example that reads `runs/quickstart` runs on a tiny run in its place."""
    import torch

    train(tiny("train.steps=1"))
    examples = [code for _, code in PYTHON if "runs/quickstart" in code]
    assert any("load_model" in code and "logits" in code for code in examples)
    for code in examples:
        names: dict[str, Any] = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
        exec(code.replace("runs/quickstart", str(tmp_path / "run")), names)
        if "logits" in names:
            assert names["logits"].shape[-1] == 320, code


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_python_examples_import_what_exists(page: str, code: str) -> None:
    """Except what another example of the page adds to the module."""
    added = set(re.findall(r"^class (\w+)", PAGES[page], flags=re.MULTILINE))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("osp"):
            module = importlib.import_module(node.module or "")
            assert not [
                alias.name for alias in node.names if not hasattr(module, alias.name) and alias.name not in added
            ]


# --- the generated page -------------------------------------------------------------------------------------------


def test_configuration_page_is_what_the_generator_writes() -> None:
    _, marker, generated = PAGES["docs/configuration.md"].partition(make_reference.MARKER + "\n")
    assert marker
    assert generated == make_reference.render(), "run `python docs/make_reference.py`"


def test_configuration_page_has_every_key_with_a_meaning() -> None:
    page = PAGES["docs/configuration.md"]
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| .* \| .* \| (.*) \|$", page, flags=re.MULTILINE)
    assert not [key for key, meaning in rows if len(meaning) < 4 and not re.match(r"monitor\.alerts\.[a-zR]", key)]
    named = set(re.findall(r"^\| `([\w.\[\]]+)` \|", page, flags=re.MULTILINE))
    keys = {re.sub(r"^(monitor\.alerts\.\w+\.\w+)\.\w+$", r"\1", key) for key, _ in leaves(to_dict(Config()))}
    assert not keys - named


def test_configuration_page_has_every_script() -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"entry"}
    assert set(make_reference.script_configs()) == scripts
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} <= scripts


# --- the site -----------------------------------------------------------------------------------------------------


def build_site(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of the repository at `root` as `make docs` does."""
    (options,) = re.findall(r"mkdocs build (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "mkdocs", "build", *options.split(), "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built strictly: a broken link, a missing anchor or a page outside the navigation is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = build_site(ROOT, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_mistakes_end_the_build_of_the_site(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "lost.md").write_text("# A page outside the navigation\n", encoding="utf-8")
    mistakes = "\n[link](nothing.md), [anchor](norms.md#nothing), ![picture](assets/nothing.svg)\n"
    with (tmp_path / "docs" / "data.md").open("a", encoding="utf-8") as file:
        file.write(mistakes)
    built = build_site(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    for message in ("nothing.md", "norms.md#nothing", "assets/nothing.svg", "lost.md"):
        assert message in built.stderr


def test_site_has_a_page_for_every_file(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page


def test_site_needs_no_other_host(site: Path) -> None:
    """No page, style or picture loads anything over the network. Links that a reader follows are fine."""
    other = r"""["']?\s*(?:https?:)?//"""
    wanted = (
        rf"""<(?:script|img|source|iframe|video|audio|embed|object)\b[^>]*\b(?:src|srcset|data)={other}""",
        rf"""<link\b(?![^>]*\brel=["']?canonical)[^>]*\bhref={other}""",
        rf"""url\({other}""",
        rf"""@import\s+{other}""",
        rf"""<(?:image|use)\b[^>]*\bhref={other}""",
    )
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert not [match for pattern in wanted for match in re.findall(pattern, text)], path
