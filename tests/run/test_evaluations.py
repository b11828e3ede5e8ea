"""Records of evaluations: older versions are read, and a file that is not a record is left out."""

import json
from pathlib import Path

from osp.run.evaluations import read_comparison
from osp.run.read import read_run
from tests.made_run import small_run, write_evaluations


def test_model_without_a_step_takes_the_step_of_its_record(tmp_path: Path) -> None:
    """The step is a key of the model or, in an older version, only of the record."""
    write_evaluations(tmp_path)
    path = tmp_path / "evaluation" / "compare" / "step_00001200.json"
    (model,) = read_comparison(path).models
    assert model.step == 1200
    values = json.loads(path.read_text())
    del values["models"][0]["step"]
    path.write_text(json.dumps(values))
    assert read_comparison(path).models == (model,)
    values["models"][0]["step"] = 7
    path.write_text(json.dumps(values))
    assert read_comparison(path).models[0].step == 7


def test_invalid_records_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_evaluations(small_run(tmp_path / "run"))
    for name in ("broken.json", "compare/other.json"):
        (folder / "evaluation" / name).write_text('{"model": 3}')
    run = read_run(folder)
    assert run.notes == [
        "evaluation/broken.json: not a record of an evaluation; left out",
        "compare/other.json: not a record of an evaluation; left out",
    ]
    assert [len(record.results) for record in run.evaluations] == [2]
    assert run.comparison is not None
