"""WebDataset shards: timm's reader of their description, webdataset's of the tars.

timm's own iteration leaves out what it cannot read without a word, and one process's order goes on
from epoch to epoch. Here every sample is handed on with its name, and the order of an epoch follows
from the seed and its number.
"""

import itertools
import json
import os
import random
import tarfile
from collections.abc import Iterator
from typing import Any

import webdataset
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import get_worker_info

from vitlinear.errors import UserError, one_line

from .class_names import class_list
from .listing import image_suffixes

FIRST_KEYS = ["jpg", "jpeg", "png", "webp"]  # of several images of a sample


def _image_keys() -> list[str]:
    keys = {suffix.removeprefix(".") for suffix in image_suffixes()}
    return FIRST_KEYS + sorted(keys.difference(FIRST_KEYS))


class ShardReader(ReaderWds):
    """Yields (name, content of an image file, label) of this worker's shards.

    In training without end, shards and samples shuffled; otherwise each sample once, in order.
    """

    classes: list[str] | None = None
    asked: str | None = None  # key of the images

    @classmethod
    def open(cls, root: str, split: str, options: dict[str, Any]) -> "ShardReader":
        """Opens a split of the shards in a folder.

        Args:
            root: Folder of the shards and of ``_info.json`` or ``info.json``.
            split: Name of a split in that file, or shard files and their number of samples in
                timm's syntax, ``train-{0000..0009}.tar|10000``.
            options: Of timm's ``create_dataset``; ``class_map`` names the classes.
        """
        options = dict(options)
        names = class_list(options.pop("class_map")) if options.get("class_map") else None
        options.pop("download", None)
        asked = options.get("input_key")
        options["input_key"] = asked or ";".join(_image_keys())
        reader = cls(root=root, split=split, **options)
        reader.classes, reader.asked = names, asked
        if not reader.num_samples:
            raise ValueError(f"how many images has it? Write '{split}|NUMBER'")
        for url in reader.urls():
            if "://" not in url and not url.startswith("pipe:") and not os.path.isfile(url):
                raise ValueError(f"there is no shard {url}")
        return reader

    def urls(self) -> list[str]:
        """Returns every shard of the split."""
        return [os.path.join(self.root, name) for name in self.split_info.filenames]

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Takes the number of data workers, which share the shards.

        Raises:
            UserError: In training a worker would have none, and wait for ever.
        """
        super().set_loader_cfg(num_workers)
        shards = len(self.urls())
        if self.is_training and shards < self.global_num_workers:
            raise UserError(
                f"{shards} training shards are too few for {self.global_num_workers} data workers "
                f"in {self.dist_num_replicas} process(es): lower --workers, or write more shards"
            )

    def samples_per_worker(self) -> int:
        """Returns how many samples of a training epoch are this worker's: whole batches."""
        return int(self._num_samples_per_worker())

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        place, share = self._share()
        if not self.is_training:
            for _, samples in self.shards():
                yield from samples
            return
        # Strings are hashed whole: neighbouring epochs and seeds give unrelated orders.
        seed = f"{self.common_seed}/{self.epoch_count.value}"
        urls = self.urls()
        random.Random(seed).shuffle(urls)
        for turn in itertools.count():
            shuffle = webdataset.shuffle(
                self.sample_shuffle_size,
                initial=self.sample_initial_size,
                rng=random.Random(f"{seed}/{place}/{turn}"),
            )
            yield from map(self._parts, self._samples(urls[share], shuffle))

    def shards(self) -> Iterator[tuple[str, Iterator[tuple[str, bytes, int]]]]:
        """Yields this worker's shards, each once, with their samples."""
        lengths = self.split_info.shard_lengths or itertools.repeat(None)
        for url, length in list(zip(self.urls(), lengths, strict=False))[self._share()[1]]:
            yield url, self._whole_shard(url, length)

    def _share(self) -> tuple[int, slice]:
        """Returns this worker's number among those of all processes, and which shards it has."""
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        place = self.dist_rank * workers + (worker.id if worker else 0)
        return place, slice(place, None, self.dist_num_replicas * workers)

    def _whole_shard(self, url: str, length: int | None) -> Iterator[tuple[str, bytes, int]]:
        count = 0
        for sample in self._samples([url]):
            yield self._parts(sample)
            count += 1
        if length not in (None, count):
            raise UserError(f"shard {url} holds {count} samples, its description says {length}")

    def _samples(self, urls: list[str], *stages: Any) -> Iterator[dict[str, Any]]:
        """Yields webdataset's samples: file contents by extension, ``__key__``, ``__url__``."""
        reading = webdataset.tarfile_to_samples(handler=webdataset.reraise_exception)
        pipeline = webdataset.DataPipeline(webdataset.SimpleShardList(urls), reading, *stages)
        samples = iter(pipeline)
        while True:
            try:
                sample = next(samples, None)
            except (OSError, EOFError, ValueError, tarfile.TarError) as error:
                # webdataset adds the open file and the address to what the error says
                cause, *_, url = error.args if len(error.args) > 1 else (one_line(error), urls)
                raise UserError(f"cannot read shard {url}: {cause}; fetch it again") from error
            if sample is None:
                return
            yield sample

    def _parts(self, sample: dict[str, Any]) -> tuple[str, bytes, int]:
        where = f"{sample['__url__']}: {sample['__key__']}"
        for key in self.input_key.split(";"):
            if key in sample:
                return f"{where}.{key}", sample[key], self._label(sample, where)
        found = ", ".join(key for key in sample if not key.startswith("__"))
        wanted = f"none of {self.asked}" if self.asked else "no image that Pillow reads"
        raise UserError(f"{where} holds {found}, {wanted}: name it by --input-key")

    def _label(self, sample: dict[str, Any], where: str) -> int:
        field = self.target_key or self.split_info.alt_label
        try:
            label = json.loads(sample["json"])[field] if field else sample["cls"].decode().strip()
            if self.classes is not None and label in self.classes:
                return self.classes.index(label)
            return int(label)
        except (KeyError, TypeError, ValueError) as error:
            wanted = f"'{field}' in a .json file" if field else "a .cls file"
            raise UserError(
                f"{where} has no label, which should be a number or a name of --class-map from "
                f"{wanted}; --target-key names another ({one_line(error)})"
            ) from error
