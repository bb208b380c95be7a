"""Drawings and label maps of a test, each under a path of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.dist import barrier
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image

from vitlinear.errors import UserError
from vitlinear.files import ResultPaths, check_no_input_folder, make_folder, write_atomically


class ResultsHook(Hook):
    """Writes what a test finds on each image; mmdet's and mmseg's own writers go by file names.

    Args:
        drawings: Folder for images with what was found drawn in.
        label_maps: Folder for label maps, in the numbers of the data set's own maps.
        overwrite: Replace files of an earlier run.
        settings: For the visualizer, such as ``pred_score_thr``.
    """

    def __init__(
        self,
        drawings: str | None,
        label_maps: str | None,
        overwrite: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.drawings, self.label_maps = drawings, label_maps
        self.overwrite, self.settings = overwrite, settings or {}
        self.paths: dict[str, dict[str, Path]] = {}

    def attach(self, runner: Runner) -> None:
        """Plan the paths of all images of a runner's test, and write while it tests.

        Raises:
            UserError: A folder is one that images are read from, or cannot be made.
        """
        dataset = runner.test_loop.dataloader.dataset
        entries = [dataset.get_data_info(index) for index in range(len(dataset))]
        images = list(dict.fromkeys(entry.get("img_path") for entry in entries))
        if None in images:
            raise UserError("--show-dir and --out: the data set has images without files")
        self.paths = {image: {} for image in images}
        paths = ResultPaths(images, self.overwrite)
        for kind, name in (("drawing", self.drawings), ("label map", self.label_maps)):
            if name is None:
                continue
            folder = Path(name).expanduser()
            check_no_input_folder(folder, {Path(image).parent for image in images})
            make_folder(folder)
            for image in images:
                (self.paths[image][kind],) = paths.take(folder, Path(image).stem, [".png"])
        barrier()  # all processes have looked which paths are free
        runner.register_hook(self)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Write what belongs to the images of a batch."""
        for sample in outputs or ():
            paths = self.paths[sample.img_path]
            if "drawing" in paths:
                write_atomically(paths["drawing"], self._drawer(runner, sample))
            if "label map" in paths:
                labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
                # The numbers of such a data set's own maps begin with 1.
                labels = labels + int(bool(sample.get("reduce_zero_label", False)))
                image = Image.fromarray(
                    labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
                )
                write_atomically(paths["label map"], _saver(image))

    def _drawer(self, runner: Runner, sample: Any) -> Callable[[Path], None]:
        image = mmcv.imfrombytes(get(sample.img_path), channel_order="rgb")

        def draw(temporary: Path) -> None:
            drawn = temporary.with_name(f"{temporary.name}.png")  # the ending says the format
            runner.visualizer.add_datasample(
                "test", image, data_sample=sample, out_file=str(drawn), **self.settings
            )
            os.replace(drawn, temporary)

        return draw


def _saver(image: Image.Image) -> Callable[[Path], None]:
    return lambda temporary: image.save(temporary, "PNG")
