"""The folder of a run: made when it starts, gone again if it fails before it has a row or state."""

import contextlib
import datetime
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vitlinear.cli.parser import Parser
from vitlinear.data.bad_images import BAD_IMAGES
from vitlinear.errors import UserError

STATE, PREVIOUS_STATE = "last_state.pt", "previous_state.pt"
LAST, BEST = "last.safetensors", "best.safetensors"
ARGUMENTS, CURVES = "args.yaml", "curves.png"
SUMMARY, METRICS, UPDATES = "summary.csv", "metrics.jsonl", "updates.jsonl"
ENVIRONMENT, PATCHES = "environment.json", "git*.patch"
TENSORBOARD, WANDB = "tensorboard", "wandb"
FILES = (
    STATE, PREVIOUS_STATE, LAST, BEST, ARGUMENTS, CURVES, BAD_IMAGES, SUMMARY, METRICS, UPDATES,
    ENVIRONMENT,
)  # fmt: skip


@dataclass(frozen=True)
class FolderConfig:
    """Where the files of a run go, and what becomes of a run that is there."""

    output: str | None
    experiment: str | None
    overwrite: bool
    resume: str | None


def add_folder_flags(parser: Parser) -> None:
    """Adds the flags of `FolderConfig`."""
    group = parser.group("run")
    group.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="run folder (default: output/train/TIME-MODEL)",
    )
    group.add_argument("--experiment", default=None, metavar="NAME", help="sub-folder of --output")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run there")
    group.add_argument(
        "--resume",
        default=None,
        metavar="PATH",
        help="a run folder or its last_state.pt; auto: --output, if there is a run",
    )


def run_folder(output: str | None, experiment: str | None, model: str) -> Path:
    """Returns where a run's files go.

    ``--output`` itself, or ``--experiment`` below it; without either, a name made of the time and
    the model, below ``output/train``.
    """
    if output is None and experiment is None:
        safe = "".join(char if char.isalnum() else "_" for char in model)
        experiment = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{safe}"
    folder = Path(output or "output/train").expanduser()
    return folder / experiment if experiment else folder


class RunFolder:
    """Context manager that creates a run folder, and removes what it made if that tells nothing.

    A run that fails keeps its folder once there is a row, which shows how it went, or a state.

    Args:
        path: The folder.
        resume: Continue the run that is there.
        overwrite: Delete the files of the run that is there.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.resume, self.overwrite = path, resume, overwrite
        self.made: list[Path] = []
        self.fresh = False

    def check(self) -> None:
        """Refuses a folder that holds another run, unless told otherwise; writes nothing."""
        if self.resume or self.overwrite:
            return
        for name in FILES:
            if (self.path / name).exists():
                raise UserError(
                    f"{self.path} already holds a run ({name}): use --resume auto to continue it, "
                    "--overwrite to replace it, or another --output"
                )

    def __enter__(self) -> "RunFolder":
        self.check()
        self.made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            for name in FILES:
                # of a run that was killed while it wrote
                (self.path / f".{name}.tmp").unlink(missing_ok=True)
            if self.overwrite:
                self._remove_files()
        except OSError as error:
            self._remove_made()
            raise UserError(
                f"output folder {self.path} is not writable ({error.strerror}): "
                "choose another --output"
            ) from error
        self.fresh = not any((self.path / name).exists() for name in FILES)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self.fresh and not self._tells_something():
            with contextlib.suppress(OSError):
                self._remove_files()
            self._remove_made()

    def _tells_something(self) -> bool:
        paths = (self.path / name for name in (STATE, PREVIOUS_STATE, METRICS, UPDATES))
        return any(path.exists() and path.stat().st_size for path in paths)

    def _remove_files(self) -> None:
        for path in (*(self.path / name for name in FILES), *self.path.glob(PATCHES)):
            path.unlink(missing_ok=True)
        for name in (TENSORBOARD, WANDB):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)

    def _remove_made(self) -> None:
        for path in self.made:  # innermost first
            with contextlib.suppress(OSError):
                path.rmdir()  # only ever an empty folder
