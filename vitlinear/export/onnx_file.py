"""An ONNX file: the program, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(program: Any, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program, and have it checked.

    torch's exporter notes for each node the stack of calls that made it, with the paths of files
    on this machine: a third of the file of a small model, and of no use to who runs it.

    Args:
        program: An ``onnx.ModelProto``; what it said of itself is replaced.
        path: The file.
        metadata: What the file is to say of itself.
    """
    import onnx

    graph = program.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (graph, *graph.node, *values):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(program, dict(metadata))
    onnx.save(program, path)
    onnx.checker.check_model(path, full_check=True)
