"""The recipes and configs that come with the package: where each is, and the ``configs`` command.

They are written in ``configs/`` at the top of the repository. ``vitlinear/.mim`` links there in a
checkout and holds the files in a wheel, because that is where mmengine looks for
``vitlinear::detection/...``.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from vitlinear.errors import UserError, did_you_mean

from .parser import Parser

FOLDER = Path(__file__).resolve().parents[1] / ".mim" / "configs"
# What a file is called, and ends with, in the folder of each task.
TASKS = {
    "classification": ("recipe", ".yaml"),
    "detection": ("detector", ".py"),
    "segmentation": ("segmentor", ".py"),
}
MODEL = re.compile(r'^model: *(\S+)|\bmodel="(\S+?)"', re.MULTILINE)


def config_paths(task: str) -> dict[str, Path]:
    """Returns the files of a task by their names, which have no suffix.

    Raises:
        UserError: The files are not there.
    """
    folder, suffix = (FOLDER / task).resolve(), TASKS[task][1]
    if not folder.is_dir():
        raise UserError(
            f"{FOLDER} is not a folder: this copy of vitlinear is without its configs. In a git "
            "checkout it is a symbolic link: git config core.symlinks true, then check out again"
        )
    return {path.name.removesuffix(suffix): path for path in sorted(folder.glob(f"*{suffix}"))}


def find_config(name: str, task: str, beside: Path = Path()) -> Path:
    """Returns the file that a user means by a path, or by the name of one that comes with us.

    Args:
        name: A path, which wins where something is there, or a name with or without its suffix.
        task: One of `TASKS`.
        beside: What a path is relative to.

    Returns:
        The file; a path as it is, if it has folders or a suffix and nothing is there.

    Raises:
        UserError: There is none of that name; the message has near misses.
    """
    what, suffix = TASKS[task]
    path = beside / name
    if path.is_file() or Path(name).name != name:
        return path
    known = config_paths(task)
    if name.removesuffix(suffix) in known:
        return known[name.removesuffix(suffix)]
    if name.endswith((suffix, ".yml")):
        return path
    raise UserError(
        f"'{name}' is neither a file nor the name of a {what}{did_you_mean(name, known)}; "
        f"`vitlinear configs --task {task}` lists the names"
    )


def main(argv: Sequence[str] | None, prog: str = "vitlinear configs") -> None:
    """Runs ``vitlinear configs``."""
    parser = Parser(prog=prog, description="The recipes and configs that come with the package.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the path of this one alone")
    parser.add_argument("--task", choices=TASKS, default=None, help="only those of one task")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--show", action="store_true", help="print what NAME holds")
    output.add_argument("--json", action="store_true", help="JSON on standard output")
    args = parser.parse_args(argv)
    rows = [
        {"name": name, "task": task, "model": _model(path), "path": str(path)}
        for task in ([args.task] if args.task else TASKS)
        for name, path in config_paths(task).items()
    ]
    if args.name is None and args.show:
        raise UserError("--show needs the NAME of a config")
    if args.name is not None:
        names = [row["name"] for row in rows]
        rows = [row for row in rows if row["name"] == args.name]
        if not rows:
            hint = did_you_mean(args.name, names)
            raise UserError(f"unknown config '{args.name}'{hint}; `vitlinear configs` lists them")
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.show:
        print(Path(rows[0]["path"]).read_text(encoding="utf-8"), end="")
    elif args.name is not None:
        print(rows[0]["path"])
    else:
        widths = [max(len(row[key]) for row in rows) for key in ("name", "task")]
        for row in rows:
            print(f"{row['name']:<{widths[0]}}  {row['task']:<{widths[1]}}  {row['model']}")


def _model(path: Path) -> str:
    """Returns the model that a file names itself, as each of ours does."""
    found = MODEL.search(path.read_text(encoding="utf-8"))
    return found[1] or found[2] if found else ""
