"""Loggers for programs that show runs: TensorBoard and wandb, each imported when asked for."""

import importlib.util
import re
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlinear.cli.flags import COUNT
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, one_line

from .folder import TENSORBOARD, WANDB
from .logger import Logger


@dataclass(frozen=True)
class RecordConfig:
    """Logging and drawing of a run, beside the tables of numbers that every run has."""

    log_interval: int
    log_tensorboard: bool
    log_wandb: bool
    wandb_project: str | None
    wandb_tags: tuple[str, ...] | None
    wandb_resume_id: str | None
    plot: bool


def add_record_flags(parser: Parser) -> None:
    """Adds the flags of `RecordConfig`."""
    group = parser.group("run")
    group.add_argument(
        "--log-interval", type=COUNT, default=50, metavar="N", help="updates between log lines"
    )
    group.add_argument(
        "--log-tensorboard",
        action=BooleanOptionalAction,
        default=False,
        help="event files in the run folder",
    )
    group.add_argument(
        "--log-wandb", action=BooleanOptionalAction, default=False, help="Weights & Biases"
    )
    group.add_argument("--wandb-project", default=None, metavar="NAME", help="default: wandb's")
    group.add_argument(
        "--wandb-tags", nargs="+", default=None, metavar="TAG", help="shown with the run"
    )
    group.add_argument(
        "--wandb-resume-id", default=None, metavar="ID", help="default: the run folder's wandb run"
    )
    group.add_argument("--plot", action=BooleanOptionalAction, default=True, help="curves.png")
    for flag in ("wandb_project", "wandb_tags", "wandb_resume_id"):
        parser.needs(flag, "log_wandb")


def check_trackers(tensorboard: bool, wandb: bool) -> None:
    """Raises `UserError` if a package that was asked for is not installed."""
    for asked, name in ((tensorboard, TENSORBOARD), (wandb, WANDB)):
        spec = importlib.util.find_spec(name) if asked else None
        # A mere folder of that name, as wandb leaves one, is a package without an origin.
        if asked and (spec is None or spec.origin is None):
            raise UserError(
                f"--log-{name} needs the {name} package: pip install {name}, or leave the flag out"
            )


def make_trackers(config: RecordConfig, folder: Path, flags: Mapping[str, Any]) -> list[Logger]:
    """Makes the loggers that are asked for.

    Args:
        config: What is asked for.
        folder: The run folder.
        flags: Of the run, to show.
    """
    trackers: list[Logger] = []
    if config.log_tensorboard:
        trackers.append(TensorBoardLogger(folder))
    if config.log_wandb:
        trackers.append(
            WandbLogger(
                folder,
                flags,
                config.wandb_project,
                config.wandb_tags,
                config.wandb_resume_id or None,
            )
        )
    return trackers


class TensorBoardLogger(Logger):
    """Scalars ``update/NAME`` and ``epoch/NAME``, each against its own count.

    Event files cannot be cut. A resumed run starts new ones which say from which step on the
    earlier ones are void, and TensorBoard shows no point twice. As that step is one number for a
    whole folder, updates and epochs have a folder each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / TENSORBOARD
        self.writers: dict[str, Any] = {}

    def keep_before(self, epoch: int, update: int) -> None:
        """Starts the event files."""
        from torch.utils.tensorboard import SummaryWriter

        for name, done in (("update", update), ("epoch", epoch)):
            self.writers[name] = SummaryWriter(str(self.folder / name), purge_step=done + 1)

    def log_update(self, update: int, values: Mapping[str, Any]) -> None:
        """Writes one scalar for each number."""
        self._write("update", update, values)

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Writes one scalar for each number."""
        self._write("epoch", row["epoch"], row)

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name != kind and value is not None:
                self.writers[kind].add_scalar(f"{kind}/{name}", value, step)
        self.writers[kind].flush()  # a kill then loses nothing that a checkpoint may know of

    def close(self, failed: bool = False) -> None:
        """Closes the event files."""
        for writer in self.writers.values():
            writer.close()


class WandbLogger(Logger):
    """A wandb run, with ``update/NAME`` and ``epoch/NAME`` against their counts.

    wandb's own step is the number of updates: it only grows, so wandb itself leaves out what a
    resumed run logs again. Modes, keys and hosts are those of wandb's environment variables.

    Args:
        folder: The run folder; wandb's own files go to ``wandb`` in it.
        flags: Of the run.
        project: wandb's project.
        tags: Shown with the run.
        resume_id: The wandb run to go on with; by default the one that this folder began, if any.

    Raises:
        UserError: wandb refuses, as without a login.
    """

    def __init__(
        self,
        folder: Path,
        flags: Mapping[str, Any],
        project: str | None = None,
        tags: Sequence[str] | None = None,
        resume_id: str | None = None,
    ) -> None:
        self.folder, self.flags = folder, dict(flags)
        self.project, self.tags, self.resume_id = project, tags, resume_id
        self.run: Any = None
        self.update = 0

    def keep_before(self, epoch: int, update: int) -> None:
        """Starts the run, or goes on with it."""
        import wandb

        run_id = self.resume_id or (latest_run_id(self.folder / WANDB) if update else None)
        try:
            self.run = wandb.init(
                project=self.project,
                name=self.folder.name,
                config=self.flags,
                tags=self.tags,
                dir=str(self.folder),
                id=run_id,
                resume="must" if self.resume_id else "allow" if run_id else None,
            )
        except (wandb.Error, OSError, ValueError) as error:
            raise UserError(
                f"--log-wandb: {one_line(error)}; log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        self.update = update
        for kind in ("update", "epoch"):
            self.run.define_metric(kind)
            self.run.define_metric(f"{kind}/*", step_metric=kind)

    def log_update(self, update: int, values: Mapping[str, Any]) -> None:
        """Sends the numbers."""
        self.update = update
        self._send("update", {"update": update, **values})

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Sends the numbers."""
        self.update = row.get("updates", self.update)
        self._send("epoch", row)

    def _send(self, kind: str, values: Mapping[str, Any]) -> None:
        named = {name if name == kind else f"{kind}/{name}": v for name, v in values.items()}
        self.run.log(named, step=self.update)

    def close(self, failed: bool = False) -> None:
        """Waits until wandb has everything."""
        if self.run is not None:
            self.run.finish(exit_code=int(failed))


def latest_run_id(folder: Path) -> str | None:
    """Returns the id of the last run that wandb began in ``folder``; None if there is none."""
    names = (
        re.fullmatch(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)", path.name)
        for path in folder.glob("*run-*")
    )
    found = max(((match[1], match[2]) for match in names if match), default=None)
    return found[1] if found else None
