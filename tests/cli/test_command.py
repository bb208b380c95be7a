"""The command itself, and the thin scripts beside it."""

import errno
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import vitlinear
from tests.commands import Command
from vitlinear_cli import COMMANDS, main, run

ROOT = Path(__file__).parents[2]


@pytest.mark.quick
def test_help_lists_the_commands(command: Command) -> None:
    for flags in ([], ["--help"], ["-h"]):
        result = command(*flags)
        assert result.code == 0
        assert all(name in result.out for name in COMMANDS)


def test_version(command: Command) -> None:
    assert command("--version").out == f"vitlinear {vitlinear.__version__}\n"


@pytest.mark.quick
def test_unknown_command_and_option(command: Command) -> None:
    result = command("trian")
    assert result.code == 2 and result.out == ""
    assert result.err == (
        "error: unknown command 'trian' (did you mean train?); `vitlinear --help` lists them\n"
    )
    assert "unknown option '--verson'" in command("--verson").err


@pytest.mark.parametrize("name", ["train", "validate", "predict", "export"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: vitlinear {name}" in capsys.readouterr().out


def test_interrupting_is_quiet(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitlinear.train import run

    def interrupted(argv: list[str], prog: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", interrupted)
    assert command("train") == (130, "", "interrupted\n")


def test_interrupting_what_is_imported_first(tmp_path: Path) -> None:
    """Torch takes seconds, in which a user who has mistyped something presses Ctrl-C."""
    (tmp_path / "vitlinear").mkdir()
    (tmp_path / "vitlinear" / "__init__.py").write_text("raise KeyboardInterrupt\n")
    folders = [str(tmp_path), str(ROOT)]
    code = (
        f"import sys; sys.path[:0] = {folders}\n"
        "import vitlinear_cli; print(vitlinear_cli.main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "130\n", "interrupted\n")


@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [
        ([], False),
        (["--version"], True),
        (["configs"], False),
        (["configs"], True),
        (["configs", "--help"], False),
    ],
)
def test_output_that_cannot_be_written(
    argv: list[str],
    unbuffered: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full disk, and standard output that is closed."""
    with open("/dev/full", "wb", 0) as raw:
        output = io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw))
        output.reconfigure(write_through=unbuffered)
        monkeypatch.setattr(sys, "stdout", output)
        assert main(argv) == 2
        output.close()  # which writes what is left
        monkeypatch.setattr(sys, "stdout", None)
        assert main(argv) == 2
    assert capsys.readouterr().err == (
        "error: cannot write to standard output: No space left on device\n"
        "error: standard output is closed: open it, or send it to /dev/null\n"
    )


def test_errors_of_other_files_are_their_own() -> None:
    def fail(argv: object) -> None:
        raise OSError(errno.ENOSPC, "of another file")

    with pytest.raises(OSError, match="of another file"):
        run(fail, [])


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train", ["--dataset", "digit"], "unknown data set 'digit'"),
        ("validate", [], "no weights"),
        ("compare_runs", ["nowhere"], "nowhere is no run of `vitlinear train`"),
        ("predict", ["nowhere.png"], "nowhere.png does not exist"),
        ("export", ["ravlt_q", "out.onnx"], "model 'ravlt_q' is unknown"),
        ("convert_checkpoint", ["nowhere.pth", "out.safetensors"], "nowhere.pth does not exist"),
    ],
)
def test_scripts_are_the_commands(
    script: str,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.process
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """One line, status 2, no traceback, no folder: also as the shell sees it."""
    command = [sys.executable, "-m", "vitlinear", "train", "--model", "ravlt_q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown model 'ravlt_q'")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    """No traceback where nobody reads on, as of `vitlinear configs | head`.

    Of the version, which does not import torch.
    """
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys, vitlinear_cli; sys.exit(vitlinear_cli.main(['--version']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""
