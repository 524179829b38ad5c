from __future__ import annotations

import json

import pytest

from hf_qat.cli.main import main
from tests.tidl.layers import one_layer


IMAGE = [1, 8, 16, 16]


def test_check_prints_the_report_and_writes_it(saved, tmp_path, capsys):
    path = saved(one_layer("Einsum", [1, 4, 8], equation="bnc->bcn"))
    assert main(["check", str(path), "--target", "J722S", "--json", str(tmp_path / "check.json")]) == 0
    printed = capsys.readouterr().out
    assert "on AM67A (J722S): TIDL takes it" in printed and "[operator] Einsum layer" in printed
    assert json.loads((tmp_path / "check.json").read_text())["layers"][0]["runs_on"] == "arm"


def test_a_refused_file_exits_with_1(saved):
    with pytest.raises(SystemExit) as exit_:
        main(["check", str(saved(one_layer("Relu", ["n", 3, 8, 8]))), "--target", "AM62A"])
    assert exit_.value.code == 1


@pytest.mark.parametrize(
    ("file", "target", "message"),
    [("absent.onnx", "AM62A", "absent.onnx"), (None, "AM99A", "Known devices: TDA4VM")],
    ids=["no file", "no device"],
)
def test_bad_input_is_one_clear_line(file, target, message, saved, capsys):
    path = file or str(saved(one_layer("Relu", IMAGE)))
    assert main(["check", path, "--target", target]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("hf-qat check: error: ")
