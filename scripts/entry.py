"""Shared by all scripts: compose the configuration with Hydra, run, and print an error of the user as one line."""

import atexit
import contextlib
import io
import itertools
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from osp.config import Config, to_dict, unknown_key
from osp.errors import LostRankError, RunError, StoppedError, UserError

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(os.path.dirname(SCRIPTS), "configs")


def launch(
    main: Callable[[dict[str, Any]], None],
    config_name: str = "train",
    *,
    defaults: dict[str, Any] | None = None,
    positional: str | None = None,
) -> NoReturn:
    """Call `run`, then end the process with its status.

    The interpreter is not finalized. DeepSpeed keeps a reference to the process group, so torch's communication threads
    are still running. A thread that frees a tensor while Python finalizes is stopped inside C++, which aborts the
    process ("terminate called without an active exception").
    """
    # Python looks for modules beside the script first: evaluate.py would hide the package that tasks of lm-eval import
    sys.path[:] = [folder for folder in sys.path if folder != SCRIPTS]
    status = 0
    try:
        run(main, config_name, defaults=defaults, positional=positional)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):  # the reader of a pipe has ended
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run(
    main: Callable[[dict[str, Any]], None],
    config_name: str = "train",
    *,
    defaults: dict[str, Any] | None = None,
    positional: str | None = None,
) -> None:
    """Run `main` on the composed, resolved configuration. Print a `UserError` as one line and exit with status 2.

    Args:
        defaults: all keys with their default values; None: the keys of a training.
        positional: key of the arguments before the first option or override. It takes all of them if its default is a
            list. Hydra does not parse them, so quotes, braces and line ends in them have no special meaning.
    """
    defaults = to_dict(Config()) if defaults is None else defaults
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    # the deepspeed launcher inserts --local_rank=N before the overrides; LOCAL_RANK has the same value
    sys.argv[1:] = _without_local_rank(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
    ConfigStore.instance().store(name="defaults", node=defaults)
    debug = any(argument in ("debug=true", "+debug=true") for argument in sys.argv)

    try:
        first: dict[str, Any] = {}
        typed = sys.argv.copy()
        if positional is not None:
            first = _take_first(sys.argv, positional, many=isinstance(defaults[positional], list | tuple))
        configs = _compose(config_name, defaults)
        sys.argv[:] = typed  # `main` may record the command
        for config in configs:
            main({**config, **first})
    except StoppedError as error:  # the run has printed it; this status tells the shell the signal
        sys.exit(128 + signal.Signals[error.signal])
    except (UserError, RunError) as error:
        if debug:
            raise
        if is_main or isinstance(error, LostRankError):
            print(f"error: {_on_one_line(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:  # before the first step, or in a script without state to save
        if is_main:
            print("interrupted; there was nothing to save", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _compose(config_name: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the resolved configuration of the command line in a list; an empty list after Hydra's --help or --cfg.

    Raises `UserError` for every error of Hydra, OmegaConf and the YAML reader: their only input comes from the user.
    """
    if {"-m", "--multirun"} & set(sys.argv):
        raise UserError("--multirun: one start trains one model; start once for each value, with another run.name")
    composed: list[DictConfig] = []
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(composed.append)()
        values = [_plain(config) for config in composed]
    except SystemExit as stop:  # from argparse, which also prints its usage
        if stop.code != 2:
            raise
        for argument, after in itertools.pairwise([*sys.argv[1:], "VALUE"]):
            name, equals, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and name in defaults:
                raise UserError(f"there is no option --{name}; write {name}={value if equals else after}") from stop
        raise UserError(errors.getvalue().strip().split("error: ")[-1] + "; see --help") from stop
    except Exception as error:  # the parser raises plain exceptions too, e.g. for `norm=null`
        raise UserError(_explained(error, defaults)) from error
    sys.stderr.write(errors.getvalue())
    return values


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that `scripts/train.py OVERRIDES` trains. Raises `UserError` if it does not compose."""
    defaults = to_dict(Config())
    ConfigStore.instance().store(name="defaults", node=defaults)
    try:
        with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
            return _plain(hydra.compose("train", overrides=list(overrides)))
    except Exception as error:
        raise UserError(_explained(error, defaults)) from error


def _plain(composed: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _without_local_rank(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _take_first(argv: list[str], key: str, *, many: bool) -> dict[str, Any]:
    """Remove the arguments before the first option or override from `argv`; return them under `key`, or {}."""
    values = list(itertools.takewhile(lambda argument: not re.match(r"-|[~+]*[A-Za-z_][\w./@]*=", argument), argv[1:]))
    if len(values) > 1 and not many:
        raise UserError(f"one {key} at a time, not {len(values)}: {' '.join(values)}")
    del argv[1 : 1 + len(values)]
    return {key: values if many else values[0]} if values else {}


def _explained(error: Exception, defaults: dict[str, Any]) -> str:
    """Return Hydra's `error` as a sentence for the user who typed the command."""
    text = str(error)
    if "To append to your config" in text and (match := re.match(r"Could not override '([^']+)'", text)):
        return unknown_key(match[1], defaults)  # the valid keys instead of Hydra's advice to append the unknown one
    if isinstance(error, OverrideParseException):
        reason = text.split("See https://hydra.cc")[0]
        reason = reason.removeprefix(f"Error parsing override '{error.override}'").strip()
        if "LexerNoViableAlt" in reason:
            reason = "a character there needs quotes"
        return (
            f"Error parsing override {error.override!r}: {reason}; write KEY=VALUE, and quote a value that is not a "
            """plain word: 'run.dir="my runs"'"""
        )
    text = text.split("Config search path:")[0].split("See https://hydra.cc")[0]
    text = re.sub(r"^In '\w+': ", "", text)
    if not isinstance(error, HydraException | OmegaConfBaseException | YAMLError):  # these name a key or a file
        text += f"; the arguments were: {' '.join(sys.argv[1:])}"
    return text if error.__cause__ is None else f"{text.rstrip()}: {error.__cause__}"


def _on_one_line(message: object) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip()
