"""The command line: what it prints, and with which status it ends."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import hf_qat
from hf_qat.cli import main as cli
from hf_qat.errors import ConfigError


ROOT = Path(hf_qat.__file__).parent.parent


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m hf_qat` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hf_qat", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture
def command(monkeypatch):
    """Makes a command `probe` that calls a function with its arguments."""

    def make(function) -> None:
        module = ModuleType("probe_of_the_command_line")
        module.main = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command(module.__name__, "a command of this test"))

    return make


def raising(error: BaseException):
    def function(argv):
        raise error

    return function


def test_version_is_that_of_the_package():
    done = command_line("--version")
    assert (done.returncode, done.stdout) == (0, f"hf_qat {hf_qat.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "unloaded"),
    [
        (["--help"], {"torch", "transformers", "numpy"}),
        *(([name, "--help"], {"torch"}) for name in cli.COMMANDS if name != "train"),  # which has all of Trainer's
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_does_not_wait_for_pytorch(arguments, unloaded):
    program = (
        "import sys\n"
        "from hf_qat.cli.main import main\n"
        f"try: main({arguments})\n"
        f"except SystemExit: print({unloaded} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage: hf-qat") and done.stdout.splitlines()[-1] == "set()"


def test_a_bad_option_ends_with_status_2_and_one_line_that_names_it():
    done = command_line("demo", "--sead", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "hf-qat demo: error: unrecognized arguments: --sead 1"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "analyze"])
@pytest.mark.parametrize("number", ["0", "-2", "1.5"])
def test_images_at_a_time_are_a_whole_number_from_1(command, number, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--batch_size", number])
    assert ended.value.code == 2
    assert f"--batch_size: '{number}' is no whole number from 1" in capsys.readouterr().err


def test_help_lists_every_command_with_its_summary(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    for name, row in cli.COMMANDS.items():
        assert [name, row.summary] in lines


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: hf-qat {name} ") and "--config" in text


@pytest.mark.parametrize("arguments", [["dmeo"], ["dmeo", "--seed", "1"]], ids=["alone", "with options"])
def test_an_unknown_command_is_named_beside_the_known_ones(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "'dmeo'" in message and "demo" in message


def test_no_command_at_all_is_bad_input(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_command_gets_all_that_follows_its_name(command):
    seen = []
    command(seen.extend)
    assert cli.main(["probe", "file.onnx", "--help", "--version", "--", "-x"]) == 0
    assert seen == ["file.onnx", "--help", "--version", "--", "-x"]


def test_an_error_of_ours_becomes_one_line_and_status_2(command, capsys):
    command(raising(ConfigError("unknown target 'int7'.")))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "hf-qat probe: error: unknown target 'int7'.\n"


def test_an_error_of_the_system_names_the_file_and_the_reason(command, capsys, tmp_path):
    absent = tmp_path / "absent.onnx"
    command(lambda argv: absent.read_bytes())
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == f"hf-qat probe: error: {absent}: No such file or directory\n"


def test_an_error_of_the_system_without_a_file_keeps_its_words(command, capsys):
    command(raising(OSError("x is no directory here, and not to be had from the Hub")))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "hf-qat probe: error: x is no directory here, and not to be had from the Hub\n"


def test_an_interrupted_command_ends_with_the_status_of_the_signal(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "hf-qat probe: interrupted\n"


def test_a_mistake_of_ours_is_not_dressed_up_as_bad_input(command):
    command(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'pin_memory' argument is set as true but no accelerator is found, then …", False),
        ("`isinstance(treespec, LeafSpec)` is deprecated, use …", False),
        ("the range of layer 3 is empty", True),
    ],
)
def test_what_libraries_remark_on_their_own_parts_is_not_shown(text, shown, command):
    command(lambda argv: warnings.warn(text, UserWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.main(["probe"]) == 0
    assert bool(caught) == shown
