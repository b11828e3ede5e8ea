"""Verify that runs of a configuration resume exactly: `python scripts/verify_resume.py +experiment=osp model=nano`."""

import dataclasses
from pathlib import Path
from typing import Any

from entry import launch

from osp.config import Config, VerifyResumeConfig, build, check_bounds, from_dict, to_dict


def main(values: dict[str, Any]) -> None:
    options = build(VerifyResumeConfig, values.pop("verify"), path="verify")
    check_bounds(options, "verify")
    config = from_dict(values)
    from osp.train.verify_resume import verify

    verify(config, options, script=Path(__file__).with_name("train.py"))


if __name__ == "__main__":
    launch(main, "verify_resume", defaults=to_dict(Config()) | {"verify": dataclasses.asdict(VerifyResumeConfig())})
