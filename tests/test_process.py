"""A console that takes no more ends no training and no result silently; a rank ends with its launcher."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Everything that prints during a training
PRINTS = """
import logging, sys, warnings
import entry
from tqdm import tqdm

def main(values):
    for i in tqdm(range(200), mininterval=0):
        print("stdout", i)
        sys.stderr.write("stderr")
        logging.warning("a message")
        warnings.warn(f"warning {i}")
        tqdm.write("above the bar", file=sys.stderr)
    print("stdout", flush=True)
    open(values["file"], "w").write("done")

entry._compose = lambda *_: [{"file": sys.argv[1]}]
name = sys.argv.pop(1)
"""
LAUNCH = "entry.launch(main, name)"


def start(folder: Path, script: str, shell: str) -> subprocess.CompletedProcess[bytes]:
    """Run PRINTS as the script of that name in `folder`, with the redirections of `shell`."""
    return subprocess.run(
        ["bash", "-c", f"cd {folder}; {shell}", "bash", sys.executable, "-c", PRINTS + LAUNCH, script, "file"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" > /dev/full 2>&1',
        '"$@" >&- 2>&-',
        '"$@" <&- >&- 2>&-',
        'set -o pipefail; "$@" 2>&1 | true',
        '(ulimit -f 1; exec "$@" > long 2>&1)',
    ],
)
def test_console_that_takes_no_more_ends_nothing(shell: str, tmp_path: Path) -> None:
    done = start(tmp_path, "train", shell)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "file").read_text() == "done"  # and not the messages of a closed descriptor


def test_lost_terminal_ends_nothing(tmp_path: Path) -> None:
    terminal, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"input()\n{PRINTS}{LAUNCH}", "train", "file"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    os.close(terminal)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ('set -o pipefail; "$@" 2> errors | true; status=$?; echo >> errors; cat errors >&2; exit $status', b"\n\n"),
        ('"$@" > /dev/full', b"error: cannot write to standard output: No space left on device\n"),
    ],
)
def test_lost_result_is_an_exit_status(shell: str, message: bytes, tmp_path: Path) -> None:
    done = start(tmp_path, "generate", shell)
    assert done.returncode == 1
    assert done.stderr.count(message) == 1
    assert b"Traceback" not in done.stderr
    assert not (tmp_path / "file").exists()


# A launcher that starts a rank and dies. The rank reports its end, or that it was not asked to end.
LAUNCHER = """
import os, signal, sys
if os.fork():
    os.read(0, 1)  # until the rank is ready
    os.kill(os.getpid(), signal.SIGKILL)
from osp import process
process.POLL_SECONDS = 0.01
asked = process.Launcher()
asked.watch()
signal.signal(signal.SIGTERM, lambda *_: (print("asked to end", asked.gone, flush=True), os._exit(0)))
os.write(int(sys.argv[1]), b"x")
signal.alarm(20 if asked._processes else 1)
signal.signal(signal.SIGALRM, lambda *_: (print("goes on", asked.gone, flush=True), os._exit(0)))
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, "asked to end True\n"),
        ({"RANK": "1", "CROSS_RANK": "0"}, "asked to end True\n"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "goes on False\n"),  # of a shell or a scheduler
        ({"TORCHELASTIC_RUN_ID": "x"}, "goes on False\n"),  # left in the environment
    ],
)
def test_rank_ends_with_its_launcher(variables: dict[str, str], expected: str) -> None:
    names = ("RANK", "TORCHELASTIC_RUN_ID", "CROSS_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in names} | variables
    ready, tell = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tell)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdin=ready,
        stdout=subprocess.PIPE,
        pass_fds=(tell,),
        text=True,
    )
    os.close(ready)
    os.close(tell)
    assert process.communicate(timeout=60)[0] == expected


CONTROLS = "\x1b]0;title\x07\r\x9b31m\ttab\n"
SHOWN = b"\\x1b]0;title\\x07\\r\\x9b31m\ttab\n"


@pytest.mark.parametrize(
    ("script", "terminal", "expected"),
    [
        ("evaluate", False, SHOWN),
        ("generate", True, SHOWN.replace(b"\n", b"\r\n")),  # by the terminal
        ("generate", False, CONTROLS.encode()),
    ],
)
def test_control_characters_of_foreign_text_are_shown(
    script: str, terminal: bool, expected: bytes, tmp_path: Path
) -> None:
    """The text of generate.py in a file or pipe has every byte."""
    read, write = pty.openpty() if terminal else os.pipe()
    program = f"import entry\nentry._compose = lambda *_: [{{}}]\nentry.launch(lambda _: print({CONTROLS!r}, end=''), "
    done = subprocess.run(
        [sys.executable, "-c", f"{program}{script!r})"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "PYTHONUTF8": "1"},
        stdout=write,
        timeout=60,
    )
    assert done.returncode == 0
    assert os.read(read, 1000) == expected
    os.close(read)
    os.close(write)
