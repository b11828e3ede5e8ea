"""Commands that start trainings in child processes."""

import subprocess
from pathlib import Path

from osp.config import from_dict
from osp.train.launch import training_command


def test_launcher_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('code of the working directory')")
    script = tmp_path / "scripts" / "train.py"
    script.parent.mkdir()
    script.write_text("import beside; print('trained')")
    (script.parent / "beside.py").write_text("")  # a script finds the modules beside it
    command = training_command(
        from_dict({"train": {"steps": 1}}), script=script, ranks=2, path=tmp_path / "config.yaml"
    )
    done = subprocess.run([*command[:4], "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--nproc" in done.stdout
    single = training_command(from_dict({"train": {"steps": 1}}), script=script, ranks=1, path=tmp_path / "config.yaml")
    assert subprocess.run(single, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "trained\n"
