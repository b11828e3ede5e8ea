"""The locks pin and hash what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def read_lock(name: str) -> dict[str, str]:
    """Return the version of each package in a lock, in which each has a hash."""
    text = (ROOT / name).read_text()
    entries = re.findall(r"^(\S+)==(\S+) \\((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)$", text, flags=re.MULTILINE)
    assert len(entries) == text.count("==")
    return {canonicalize_name(package): version for package, version, _ in entries}


def test_the_locks_pin_and_hash_every_dependency() -> None:
    train, dev = read_lock("requirements.lock"), read_lock("requirements-dev.lock")
    torch = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert torch is not None
    assert not train.keys() & dev.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    train["torch"] = torch[1]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for texts, pinned in ((project["dependencies"], train), (extras, train | dev)):
        for requirement in map(Requirement, texts):
            if requirement.name != "osp":
                assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
