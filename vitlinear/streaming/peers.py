"""The processes that stream one image together: each runs some of the bands.

Maps lie in files of a work directory that all of them see. Sums over bands are merged when a pass
ends; nothing else is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from vitlinear.errors import LostPeerError, UserError, one_line
from vitlinear.processes import lost_peer


def moved(value: Any, device: torch.device | str) -> Any:
    """A value whose tensors, in lists, tuples, dictionaries and data classes too, are on a device.

    Tensors that were pickled come back to where they were, and there may be another GPU's.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [moved(each, device) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        there = {each.name: moved(getattr(value, each.name), device) for each in fields(value)}
        return replace(value, **there)
    return value


class Peers:
    """A group of processes.

    Attributes:
        rank: Number of this process in it.
        size: Number of the processes.
    """

    def __init__(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        """Keep the group.

        Args:
            mesh: Of one dimension; None for this process alone.
            device: Of the model in this process; tensors travel through memory of the host.

        Raises:
            UserError: The mesh has more dimensions.
        """
        if mesh is not None and mesh.ndim != 1:
            raise UserError(
                f"bands are shared along one dimension of a mesh, got one of {mesh.ndim}: give a "
                'part of it, such as mesh["rows"]'
            )
        self.group = None if mesh is None else mesh.get_group()
        self.device = device
        self.rank = 0 if mesh is None else mesh.get_local_rank()
        self.size = 1 if mesh is None else mesh.size()

    def bands(self, number: int) -> range:
        """Of so many bands, those of this process: neighbours, and the first process has some."""
        first, stop = (-(-rank * number // self.size) for rank in (self.rank, self.rank + 1))
        return range(first, stop)

    def share(self, value: Any = None) -> list[Any]:
        """The values of all processes, which wait for each other here.

        Raises:
            LostPeerError: One of them is gone, or has failed inside of `one_fate`.
        """
        if self.size == 1:
            return [value]
        answers = self._exchange(None, value)
        for rank, (failure, _) in enumerate(answers):
            if failure is not None:
                raise LostPeerError(f"process {rank} failed: {failure}")
        return [moved(each, self.device) for _, each in answers]

    def _exchange(self, failure: str | None, value: Any) -> list[Any]:
        """Failures and values of all processes: each sends why it failed, and its value."""
        answers: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(answers, (failure, moved(value, "cpu")), group=self.group)
        except Exception as error:
            if lost := lost_peer(error):
                raise lost from error
            raise
        return answers

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """Block of all processes: where one fails, the others do at their next exchange.

        None leaves before all have come to the end, or it could not be told of a failure.

        Raises:
            LostPeerError: Another process failed; its own error says why.
        """
        try:
            yield
            self.share()
        except LostPeerError:
            raise
        except Exception as error:
            if self.size > 1:
                with suppress(LostPeerError):
                    self._exchange(one_line(error), None)
            raise

    def first(self, value: Any) -> Any:
        """The value of the first process."""
        return self.share(value if self.rank == 0 else None)[0]
