"""What every entry point shares: compose the configuration with Hydra, run, and turn a user's mistake into one line."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from osp.config import Config, RunError, UserError, to_dict, unknown_key

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")


def launch(main: Callable[[dict[str, Any]], None], config_name: str = "train") -> None:
    """Run `main` on the composed, resolved configuration. A user's mistake is one line and exit status 2."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    # the deepspeed launcher inserts --local_rank=N before the overrides; LOCAL_RANK says the same
    sys.argv[1:] = _without_local_rank(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: they become one line here
    ConfigStore.instance().store(name="defaults", node=to_dict(Config()))
    debug = any(argument in ("debug=true", "+debug=true") for argument in sys.argv)

    composed: list[DictConfig] = []  # stays empty for hydra's own --help and --cfg
    try:
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(composed.append)()
        for config in composed:
            main(_plain(config))
    except (UserError, RunError, HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        if is_main:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)


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


def _one_line(error: Exception) -> str:
    """The message of `error` on one line; Hydra's advice to append an unknown key gives way to the valid keys."""
    text = str(error)
    if "To append to your config" in text and (match := re.match(r"Could not override '([^']+)'", text)):
        return unknown_key(match[1])
    text = re.sub(r"\s*\n\s*", " ", text).split(" Config search path:")[0].split(" See https://hydra.cc")[0]
    return text.removeprefix("In 'train': ").strip()
