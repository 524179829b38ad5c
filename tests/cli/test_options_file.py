"""Options from a file, against what argparse makes of the same options when they are typed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from hf_qat.cli.options_file import parse_with_config, words_with_config
from hf_qat.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("directory", type=Path)
    made.add_argument("--private", action="store_true")
    made.add_argument("--path-in-repo", default="")
    made.add_argument("--epochs", type=float, default=1.0)
    return made


def parse(tmp_path: Path, options: object, *typed: str) -> dict[str, object]:
    """What the file and the typed options give, without the option `--config` itself."""
    file = tmp_path / "options.yaml"
    file.write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    parsed = vars(parse_with_config(parser(), ["out", "--config", str(file), *typed]))
    assert parsed.pop("config") == file
    return parsed


@pytest.mark.parametrize(
    ("options", "typed"),
    [
        ({}, []),
        ({"private": True, "epochs": 2.5}, ["--private", "--epochs", "2.5"]),
        ({"private": False}, []),
        ({"path_in_repo": "a b"}, ["--path-in-repo", "a b"]),
        ({"path-in-repo": "a"}, ["--path-in-repo", "a"]),
        ({"path_in_repo": 3}, ["--path-in-repo", "3"]),
        ({"path_in_repo": "-a"}, ["--path-in-repo=-a"]),
        ({"epochs": None}, []),
    ],
    ids=str,
)
def test_a_file_means_what_the_same_options_mean_when_they_are_typed(
    options: object, typed: list[str], tmp_path: Path
):
    assert parse(tmp_path, options) == vars(parser().parse_args(["out", *typed]))


def test_what_is_typed_wins(tmp_path: Path):
    assert parse(tmp_path, {"epochs": 2, "path_in_repo": "file"}, "--epochs", "3") == {
        "directory": Path("out"),
        "private": False,
        "path_in_repo": "file",
        "epochs": 3.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- private\n", "holds no options"),
        ("epochs: [1, 2]\n", r"epochs is \[1, 2\], and must be a text, a number"),
        ("epochs: {a: 1}\n", r"epochs is \{'a': 1\}, and must be a text"),
        ("a: b: c\n", "is no YAML"),
        ("\0", "is no YAML"),
    ],
)
def test_a_file_that_holds_no_options_is_refused_by_name(content: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"options.yaml.*{message}"):
        parse(tmp_path, content)


def test_a_value_that_the_option_does_not_take_is_refused_as_if_it_were_typed(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, {"epochs": "many"})
    assert "argument --epochs: invalid float value: 'many'" in capsys.readouterr().err


def test_without_a_file_nothing_changes():
    assert parse_with_config(parser(), ["out"]).config is None


def test_the_name_of_a_recipe_stands_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Unless there is a file of that name."""
    monkeypatch.chdir(tmp_path)
    words = words_with_config(["--config", "cnn_int8", "--target", "AM68A"])
    assert "--learning-rate-share=0.05" in words and words[-1] == "AM68A"
    Path("cnn_int8").write_text("revision: dev")
    assert words_with_config(["--config", "cnn_int8"])[:1] == ["--revision=dev"]
