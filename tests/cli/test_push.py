"""`hf-qat push`, with the real client and a Hub that stands in for the real one."""

from __future__ import annotations

import pytest
import yaml

from hf_qat.cli import main as cli


pytestmark = pytest.mark.usefixtures("waits")


def test_it_pushes_and_prints_the_address_of_the_commit(hub, directory, contents, capsys):
    assert cli.main(["push", str(directory), "user/model", "--private", "--revision", "v2"]) == 0
    repository = hub.repository("user/model")
    assert repository.private and repository.files("v2") == contents
    assert capsys.readouterr().out == f"{hub.url}/user/model/commit/{repository.at('v2').oid}\n"


def test_options_come_from_a_file_and_those_typed_win(hub, directory, contents, tmp_path):
    file = tmp_path / "push.yaml"
    options = {"private": True, "create-pr": False, "revision": "from-file", "message": "From a file"}
    file.write_text(yaml.safe_dump(options))
    assert cli.main(["push", str(directory), "user/model", "--config", str(file), "--revision", "typed"]) == 0
    repository = hub.repository("user/model")
    assert repository.private and set(repository.branches) == {"main", "typed"}
    assert repository.commits("typed")[0].title == "From a file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- private\n", "holds no options"),
        ("revision: [a, b]\n", "must be a text, a number"),
        ("a: b: c\n", "is no YAML"),
        (None, "No such file"),
    ],
    ids=["list", "list as a value", "no yaml", "absent"],
)
def test_a_bad_file_is_one_clear_line(text, message, hub, directory, tmp_path, capsys):
    file = tmp_path / "push.yaml"
    if text is not None:
        file.write_text(text)
    assert cli.main(["push", str(directory), "user/model", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(file) in error and error.count("\n") == 1


def test_an_unknown_option_in_the_file_is_named(hub, directory, tmp_path, capsys):
    file = tmp_path / "push.yaml"
    file.write_text("privat: true\n")
    with pytest.raises(SystemExit):
        cli.main(["push", str(directory), "user/model", "--config", str(file)])
    assert "unrecognized arguments: --privat" in capsys.readouterr().err
