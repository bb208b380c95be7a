"""WebDataset shards made of an image folder."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.train.helpers import CLASSES


def add_sample(tar: tarfile.TarFile, key: str, files: dict[str, bytes]) -> None:
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, root: Path, info: bool = True, shards: int = 2) -> Path:
    """Packs an image folder into shards: image, label as text, and as JSON with its name."""
    root.mkdir(parents=True)
    splits: dict[str, Any] = {}
    for split, name in (("train", "train"), ("val", "validation")):
        files = sorted((folder / split).glob("*/*.png"))
        names = [f"{split}-{number:04}.tar" for number in range(shards)]
        lengths = []
        for number, shard in enumerate(names):
            part = files[number::shards]
            lengths.append(len(part))
            with tarfile.open(root / shard, "w") as tar:
                for file in part:
                    label = CLASSES.index(file.parent.name)
                    meta = {"number": label, "name": file.parent.name}
                    add_sample(
                        tar,
                        f"{file.parent.name}_{file.stem}",
                        {
                            "png": file.read_bytes(),
                            "cls": str(label).encode(),
                            "json": json.dumps(meta).encode(),
                        },
                    )
        splits[name] = {
            "name": name,
            "num_samples": len(files),
            "filenames": names,
            "shard_lengths": lengths,
        }
    if info:
        (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root
