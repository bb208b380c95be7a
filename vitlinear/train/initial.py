"""Weights that a run starts from: whose they are, and what becomes of their classifier."""

import argparse
from pathlib import Path

import torch

from vitlinear.errors import UserError
from vitlinear.train.model import check_model_name


def check_initial(args: argparse.Namespace) -> None:
    """Refuses a recipe that fine-tunes without weights to start from, and flags that need some.

    Raises:
        UserError: There are none.
    """
    if args.initial_model is not None:
        check_model_name(args.initial_model)
        if not args.initial_checkpoint and not args.pretrained:
            raise UserError(
                f"this run is to start from weights of {args.initial_model}: "
                "give --initial-checkpoint FILE"
            )
    if args.initial_head_map is not None and not args.initial_checkpoint:
        raise UserError("--initial-head-map is for the classifier of --initial-checkpoint FILE")


def read_head_map(path: str | Path, num_classes: int) -> torch.Tensor:
    """Reads which class of the start weights each class takes its classifier from.

    Args:
        path: Text file; line i (from 0) holds the number of that class for class i.
        num_classes: Lines that there must be.

    Returns:
        [num_classes] int64.

    Raises:
        UserError: The file is missing, or does not hold that many numbers.
    """
    try:
        words = Path(path).read_text(encoding="utf-8").split()
        numbers = [int(word) for word in words]
    except OSError as error:
        raise UserError(f"cannot read --initial-head-map {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--initial-head-map {path}: needs a class number in each line") from error
    if len(numbers) != num_classes or min(numbers) < 0:
        raise UserError(
            f"--initial-head-map {path} has {len(numbers)} lines for {num_classes} classes, or a "
            "negative one: it needs the class in the start weights for each"
        )
    return torch.tensor(numbers)


def remapped(value: torch.Tensor, head_map: torch.Tensor, path: str | Path) -> torch.Tensor:
    """Returns the rows of a classifier's weight or bias that ``head_map`` names, in its order.

    Raises:
        UserError: The classifier of the start weights, ``path``, has too few classes.
    """
    if int(head_map.max()) >= len(value):
        raise UserError(
            f"--initial-head-map asks for class {int(head_map.max())}, but {path} has only "
            f"{len(value)} classes (counted from 0)"
        )
    return value[head_map]
