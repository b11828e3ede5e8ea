"""Shared by all scripts: compose the configuration with Hydra, run, and print an error of the user as one line."""

import argparse
import atexit
import contextlib
import io
import itertools
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import hydra
import psutil
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from osp.config import Config, from_dict, leaves, to_dict, unknown_key
from osp.errors import LostRankError, NotTextError, RunError, StoppedError, UserError
from osp.files import printable
from osp.process import LAUNCHER, has_ended, protect_console

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
CONFIGS = os.path.join(os.path.dirname(SCRIPTS), "configs")
SECONDS_TO_RESOLVE = 60.0  # a name that the network learns while a job starts
SECONDS_FOR_RANK_0 = 25.0  # to print the error of all ranks
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# Nodes of Hydra's own configuration that run code or change the environment
ACTIVE_NODES = ("callbacks", "launcher", "sweeper", "searchpath", "job.env_set")
LOGGING_NODES = ("job_logging", "hydra_logging")  # which --help and --info act on
# The value of an override that may be put into quotes: without quotes, escapes and nested containers
UNQUOTED = r"(?:[^'\"\\{}\[\]]|\$\{[\w.:]+\})*"


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
    prints_result = config_name not in ("train", "verify_resume")
    closed = prints_result and sys.stdout is None
    protect_console(result=prints_result and not closed, exact=config_name == "generate")
    LAUNCHER.watch()
    status = 0
    try:
        run(main, config_name, defaults=defaults, positional=positional)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    try:
        print(end="", flush=True)
    except SystemExit:
        closed = True
    os._exit(status or int(closed))


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Message())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        check_launcher()
    except UserError as error:
        print(f"error: {_on_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        logging.root.setLevel(logging.WARNING)
    # the deepspeed launcher inserts --local_rank=N before the overrides; LOCAL_RANK has the same value
    sys.argv[1:] = _without_local_rank(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
    store_defaults(defaults)
    debug = any(argument in ("debug=true", "+debug=true") for argument in sys.argv)

    try:
        _resolve_host_of_rank_0()
        first: dict[str, Any] = {}
        typed = sys.argv.copy()
        if positional is not None:
            first = _take_first(sys.argv, positional, many=isinstance(defaults[positional], list | tuple))
        sys.argv[1:] = [_parsable(argument) for argument in sys.argv[1:]]
        _call(main, config_name, defaults, first, typed)
    except StoppedError as error:  # the run has printed it; this status tells the shell the signal
        rank_0_has_ended()
        sys.exit(128 + signal.Signals[error.signal])
    except (UserError, RunError) as error:
        if debug:
            raise
        if is_main or isinstance(error, LostRankError) or not rank_0_has_ended():
            print(f"error: {_on_one_line(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:  # before the first step, or in a script without state to save
        if is_main:
            print("interrupted; there was nothing to save", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Message(logging.Formatter):
    """The text of a log message, with control characters of foreign text as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def check_launcher() -> None:
    """Raise `UserError` for variables that no launcher sets. RANK without WORLD_SIZE, or the reverse, is removed."""
    for name in (*LAUNCHER_VARIABLES, "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,9}", value):
            raise UserError(f"{name}={value!r}: must be a number; start with torchrun or deepspeed, or unset {name}")
    if len(lone := {"RANK", "WORLD_SIZE"} & os.environ.keys()) == 1:
        logging.warning("%s is set although no launcher runs: this process trains alone", *lone)
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank >= world_size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}; start with torchrun or deepspeed")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world_size > 1 and not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size} without {missing[0]}; start with torchrun or deepspeed")
    if int(os.environ.get("MASTER_PORT", "0")) > 65535:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: a port is at most 65535")


def _resolve_host_of_rank_0() -> None:
    """Wait until the name of the host is known, as when all hosts of a job have just started."""
    host, until, waiting = os.environ.get("MASTER_ADDR"), time.monotonic() + SECONDS_TO_RESOLVE, False
    while host and "RANK" in os.environ:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until:
                raise UserError(f"MASTER_ADDR={host}: the host of rank 0 has no such name: {error}") from error
            if not waiting:
                logging.warning(
                    "MASTER_ADDR=%s has no address yet; waiting for it up to %g s", host, SECONDS_TO_RESOLVE
                )
            waiting = True
        time.sleep(1)


def rank_0_has_ended() -> bool:
    """Wait for rank 0, which reports what all ranks see, and return whether it has ended by itself.

    A launcher kills all ranks once one has ended. On another host rank 0 is not seen: there the first rank reports
    after the same time.
    """
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    until = time.monotonic() + SECONDS_FOR_RANK_0
    while rank != "0" and time.monotonic() < until:
        if rank == local_rank and not _rank_0_runs():
            return True
        time.sleep(0.1)
    return rank != local_rank and local_rank != "0"


def _rank_0_runs() -> bool:
    """Return whether rank 0 is a child of this rank's parent."""
    for process in psutil.Process(os.getppid()).children():
        with contextlib.suppress(psutil.Error):  # it has ended
            if process.environ().get("RANK") == "0" and not has_ended(process):
                return True
    return False


def _call(
    main: Callable[[dict[str, Any]], None],
    config_name: str,
    defaults: dict[str, Any],
    first: dict[str, Any],
    typed: list[str],
) -> None:
    """Call `main` on the configuration of `sys.argv`, which meanwhile is `typed`: `main` may record the command.

    Hydra reads `run.name=4e12345` as a number. If a key turns out to be text, it gets the characters that were typed.
    """
    arguments = sys.argv.copy()
    while True:
        sys.argv[:] = arguments
        try:
            configs = _compose(config_name, defaults)
            sys.argv[:] = typed
            for config in configs:
                main({**config, **first})
            return
        except NotTextError as error:
            places = [i for i, argument in enumerate(arguments) if _is_quotable(argument, error.key)]
            if not places:
                raise
            arguments[places[-1]] = _quoted(arguments[places[-1]])


def _parsable(argument: str) -> str:
    """Return KEY=VALUE with quotes where Hydra cannot parse it, as for `~` and `=` in a path."""
    parse = OverridesParser.create().parse_override
    if not argument.startswith("-") and _is_quotable(argument):
        with contextlib.suppress(HydraException):
            parse(argument)
            return argument
        with contextlib.suppress(HydraException):
            parse(_quoted(argument))
            return _quoted(argument)
    return argument


def _is_quotable(argument: str, key: str | None = None) -> bool:
    """Return whether an argument is KEY=VALUE with a plain value or a list of these; None: any key."""
    match = re.fullmatch(rf"\+{{0,2}}([\w.@/-]+)=({UNQUOTED}|\[{UNQUOTED}\])", argument, flags=re.DOTALL)
    return bool(match) and key in (None, match[1])


def _quoted(argument: str) -> str:
    """Return KEY=VALUE with quotes around the value, or around each element of a list."""
    key, _, value = argument.partition("=")
    if value.startswith("["):
        elements = [f'"{element.strip()}"' for element in value[1:-1].split(",")]
        return f"{key}=[{','.join(elements)}]"
    return f'{key}="{value}"'


def store_defaults(defaults: dict[str, Any]) -> None:
    """Make all keys with their default values known to Hydra as the configuration `defaults`."""
    node = OmegaConf.create(defaults)
    if OmegaConf.select(node, "monitor.alerts") is not None:
        OmegaConf.set_struct(node.monitor.alerts, False)  # a table whose keys are free
    ConfigStore.instance().store(name="defaults", node=node)


def _compose(config_name: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the resolved configuration of the command line in a list; an empty list after Hydra's --help or --cfg.

    Raises `UserError` for every error of Hydra, OmegaConf and the YAML reader: their only input comes from the user.
    """
    if {"-m", "--multirun"} & set(sys.argv):
        raise UserError("--multirun: one start trains one model; start once for each value, with another run.name")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options = get_args_parser().parse_args()
            values = _composed(options, config_name, defaults)
    except SystemExit as stop:  # from argparse, which also prints its usage
        if stop.code != 2:
            raise
        keys = [key for key, _ in leaves(defaults)]
        for argument, after in itertools.pairwise([*sys.argv[1:], "VALUE"]):
            name, equals, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and (same := [key for key in keys if f".{key}".endswith(f".{name}")]):
                value = value if equals else "VALUE" if after.startswith("-") else after
                raise UserError(f"there is no option --{name}; write {same[0]}={value}") from stop
        reason = errors.getvalue().strip().split("error: ")[-1]
        raise UserError(f"{reason}; keys are written KEY=VALUE, see --help") from stop
    except UserError:
        raise
    except Exception as error:  # the parser raises plain exceptions too, e.g. for `norm=null`
        raise UserError(_explained(error, defaults)) from error
    sys.stderr.write(printable(errors.getvalue()))
    return values


def _composed(options: argparse.Namespace, config_name: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Do what `hydra.main` does, without Hydra's jobs: nothing that a configuration says is run or imported."""
    if options.experimental_rerun:
        raise UserError("--experimental-rerun reads a pickle, which may run any code; repeat the command instead")
    if options.shell_completion:
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(lambda _: None)()
        return []
    overrides = [argument for argument in options.overrides if argument.lstrip("+~").startswith(("hydra.", "hydra/"))]
    for key in (argument.removesuffix("={}") for argument in options.overrides if argument.endswith("={}")):
        if table := OmegaConf.select(OmegaConf.create(defaults), key.lstrip("+")):
            entries = " ".join(f"~{key}.{entry}" for entry in table)
            raise UserError(f"{key}={{}} changes nothing, because tables are merged; remove its entries: {entries}")
    if overrides:
        raise UserError(f"{overrides[0]}: keys of Hydra itself are fixed; leave it out (--config-dir names a folder)")
    folder = os.path.join(SCRIPTS, options.config_path or CONFIGS)
    for name in filter(None, (options.config_dir, folder)):
        if not os.path.isdir(name):
            raise UserError(f"Additional config directory {os.path.abspath(name)!r} not found")
    added = os.path.abspath(options.config_dir or "").replace('"', r"\"")
    search = [f'hydra.searchpath=["file://{added}"]'] if options.config_dir else []
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        given = options.config_name or config_name
        composed = hydra.compose(given, overrides=[*options.overrides, *search], return_hydra_config=True)
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        ours = hydra.compose(config_name, overrides=search, return_hydra_config=True)
    shows = options.help or options.hydra_help or options.cfg or options.info
    for key in (*ACTIVE_NODES, *(LOGGING_NODES if shows else ())):
        if OmegaConf.select(composed.hydra, key) != OmegaConf.select(ours.hydra, key):
            raise UserError(f"hydra.{key}: a configuration may not set keys of Hydra itself, which can run code")
    job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    if options.cfg and config_name == "train":  # show what a training takes
        try:
            from_dict(_plain(job))
        except NotTextError:
            raise
        except (UserError, OmegaConfBaseException):  # it is shown all the same
            pass
    if shows:
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(lambda _: None)()
        return []
    HydraConfig.instance().set_config(composed)  # for ${hydra:...}
    return [_plain(job)]


def _refuse_variable(name: str, *_: Any) -> NoReturn:
    raise UserError(
        f"${{oc.env:{name}}}: variables of the environment are not read, because configurations are written to files "
        f"and to W&B; let the shell insert it, KEY=${name}"
    )


OmegaConf.register_new_resolver("oc.env", _refuse_variable, replace=True)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that `scripts/train.py OVERRIDES` trains. Raises `UserError` if it does not compose."""
    defaults = to_dict(Config())
    store_defaults(defaults)
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
    text, cause = str(error) or type(error).__name__, error
    while cause is not None:
        if isinstance(cause, UserError):  # of a resolver
            return str(cause)
        cause = cause.__cause__ or cause.__context__
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
    if match := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"{match[1]}={match[2]}: one start takes one value, so start once for each, with another run.name; a list "
            f"is written {match[1]}=[{match[2]}]"
        )
    text = re.sub(r"^In '\w+': ", "", text)
    if not isinstance(error, HydraException | OmegaConfBaseException | YAMLError):  # these name a key or a file
        text += f"; the arguments were: {' '.join(sys.argv[1:])}"
    return text if error.__cause__ is None else f"{text.rstrip()}: {error.__cause__}"


def _on_one_line(message: object) -> str:
    return printable(re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip())
