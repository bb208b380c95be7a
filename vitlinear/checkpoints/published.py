"""Where each published file lives, what is known of it, and its licence as stated.

One row a file. Facts come from the authors' repositories and from the pages of the hubs that they
name; what is not known is None and is not guessed. Only rows with a confirmed location are wired
into models: see `pretrained_source`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

NONE_STATED = "none stated"


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    Attributes:
        family: Name of the model card.
        model: Name of the timm model that it fits; for other tasks, of the backbone.
        tag: timm's tag of the weights: data set and, where it matters, how they came to be.
        task: ``classification``, or the framework and schedule of a dense-prediction model.
        hub_id: Repository on the Hugging Face hub.
        filename: Name of the file there or at the end of `url`; None where it is not known.
        url: Direct address, for files outside the hub.
        size: Bytes.
        sha256: Hexadecimal digest, or as much of its beginning as is known.
        license: As stated for the weights, else for the repository that releases them.
        source: Where this row was read.
        note: What a user of the file should know.
    """

    family: str
    model: str
    tag: str = "in1k"
    task: str = "classification"
    hub_id: str | None = None
    filename: str | None = None
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    license: str = NONE_STATED
    source: str = ""
    note: str = ""

    @property
    def location(self) -> str:
        """Address that a browser can open."""
        if self.hub_id:
            return f"https://huggingface.co/{self.hub_id}/resolve/main/{self.filename}"
        return self.url or ""

    @property
    def wired(self) -> bool:
        """Whether ``pretrained=True`` can fetch it: timm needs the name of a file."""
        return self.task == "classification" and self.filename is not None


RALA_SOURCE = "README of github.com/qhfan/RALA at a86314f; licence from the hub's model card"
MALA_SOURCE = "README of github.com/qhfan/MALA at 7114e63 and the hub's file pages"
L2VIT_SOURCE = "readme.md of github.com/ChuanyangZheng/L2ViT at fad0341; licence from its LICENSE"
INLINE_SOURCE = "README of github.com/LeapLabTHU/InLine at e463a6f"

# The model card of the RALA hub repository says MIT for all its files; its code repository states
# no licence. Dense-prediction rows: (file name without letter, letters, framework and schedule).
_RALA_DENSE = (
    ("retinanet_{}_1x_12_epoch.pth", "tsbl", "detection: RetinaNet 1x"),
    ("maskrcnn_{}_1x_12_epoch.pth", "tsbl", "detection: Mask R-CNN 1x"),
    ("maskrcnn_{}_3x_36_epoch.pth", "sbl", "detection: Mask R-CNN 3x"),
    ("Casmaskrcnn_{}_3x_36_epoch.pth", "sbl", "detection: Cascade Mask R-CNN 3x"),
    ("fpn_{}_1x.pth", "tsbl", "segmentation: Semantic FPN"),
    ("uper_{}_2x.pth", "sbl", "segmentation: UperNet"),
)


def _rala(letter: str, filename: str, **kwargs: Any) -> PublishedFile:
    return PublishedFile(
        "rala",
        f"ravlt_{letter}",
        hub_id="aldjalkdf/RAVLT",
        filename=filename,
        license="mit",
        source=RALA_SOURCE,
        **kwargs,
    )


def _mala(letter: str, filename: str, size: int, **kwargs: Any) -> PublishedFile:
    return PublishedFile(
        "mala",
        f"mavit_{letter}",
        hub_id="aldjalkdf/MAViT",
        filename=filename,
        size=size,
        source=MALA_SOURCE,
        **kwargs,
    )


def _l2vit(size: str, tag: str, filename: str) -> PublishedFile:
    release = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
    return PublishedFile(
        "l2vit",
        f"l2vit_{size}",
        tag,
        filename=filename,
        url=f"{release}/{filename}",
        license="mit",
        source=L2VIT_SOURCE,
    )


def _inline(model: str, share: str) -> PublishedFile:
    return PublishedFile(
        "inline",
        f"inline_{model}",
        url=f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1",
        source=INLINE_SOURCE,
        note="a share link without a file name; download it, and give the file with "
        "pretrained_cfg_overlay=dict(file=...)",
    )


PUBLISHED: tuple[PublishedFile, ...] = (
    _rala("t", "RAVLT_T.pth"),
    _rala("s", "RAVLT_S.pth"),
    _rala("b", "RAVLT_B.pth", size=579_479_431),
    _rala("l", "RAVLT_L.pth"),
    *(
        _rala(letter, pattern.format(letter), tag="coco" if "det" in task else "ade20k", task=task)
        for pattern, letters, task in _RALA_DENSE
        for letter in letters
    ),
    # MAViT_T.pth and MAViT_S.pth probably exist beside these; their names are not confirmed.
    _mala("b", "MAViT_B.pth", 598_103_943, sha256="b4759f60"),
    _mala(
        "l",
        "MAViT_L.pth",
        1_173_978_671,
        sha256="17ea9be6",
        note="an earlier upload under this name held the weights of MAViT-B",
    ),
    _mala(
        "s",
        "MAViT_FPN_S_2x.pth",
        340_216_282,
        tag="ade20k",
        task="segmentation: Semantic FPN",
    ),
    _mala(
        "b",
        "MAViT_FPN_B_2x.pth",
        612_677_498,
        tag="ade20k",
        task="segmentation: Semantic FPN",
    ),
    _l2vit("tiny", "in1k", "L2ViT-Tiny-checkpoint-best-ema.pth"),
    _l2vit("small", "in1k", "L2ViT-Small-checkpoint-best-ema.pth"),
    _l2vit("base", "in1k", "L2ViT-Base-checkpoint-best-ema.pth"),
    _l2vit("base", "in22k_ft_in1k", "L2ViT-Base-22k21k-finetune-224-checkpoint-best.pth"),
    _l2vit("base", "in22k", "L2ViT-Base-22k-pretrain-checkpoint-best.pth"),
    _l2vit("base_384", "in22k_ft_in1k", "L2ViT-Base-22k21k-finetune-384-checkpoint-best.pth"),
    _inline("deit_tiny", "1d6b8191ad6d4114b291"),
    _inline("deit_small", "2f3898b07e9247f3beb3"),
    _inline("deit_base", "10bdd726d4b0435eb34e"),
    _inline("pvt_tiny", "90ac52b1555b401eb5e6"),
    _inline("pvt_small", "1ab953b2479d433080a3"),
    _inline("pvt_medium", "a72aec31e6084bc0a280"),
    _inline("pvt_large", "efd91318ba964f01b288"),
    _inline("swin_tiny", "32810869fcc34410966b"),
    _inline("swin_small", "e9657fd247c04c7cb1a1"),
    _inline("swin_base", "bf23564bb64c420aafe1"),
    _inline("cswin_tiny", "49fa2ecc543647c4b970"),
    _inline("cswin_small", "59f4e65f776f4052b93c"),
    _inline("cswin_base", "91e17121df284ae38521"),
)


def published_files(model: str) -> list[PublishedFile]:
    """Rows of a model, with or without a tag: ``ravlt_t``, ``l2vit_base.in22k``."""
    name, _, tag = model.partition(".")
    return [row for row in PUBLISHED if row.model == name and (not tag or row.tag == tag)]


def pretrained_source(model: str) -> dict[str, str]:
    """What a model's ``pretrained_cfg`` says about where its weights are.

    Args:
        model: Name, with a tag where there are several: ``ravlt_t``, ``l2vit_base.in22k``. Without
            one, the first row of the model.

    Returns:
        ``hf_hub_id`` and ``hf_hub_filename``, or ``url``; and ``license`` where one is stated.
        Empty if no file of the model has a confirmed location that timm can fetch.
    """
    row = next((row for row in published_files(model) if row.wired), None)
    if row is None:
        return {}
    source = {} if row.license == NONE_STATED else {"license": row.license}
    if row.hub_id and row.filename:
        return {"hf_hub_id": row.hub_id, "hf_hub_filename": row.filename, **source}
    assert row.url is not None
    return {"url": row.url, **source}


def published_at(hub_id: str | None, filename: str | None, url: str | None) -> PublishedFile | None:
    """The row of a location, None if it is not one of ours."""
    for row in PUBLISHED:
        if (hub_id and (row.hub_id, row.filename) == (hub_id, filename)) or (
            url and row.url == url and not hub_id
        ):
            return row
    return None


BY_HASH = "SHA-256"


def published_row(path: Path, sha256: str) -> tuple[PublishedFile, str] | None:
    """The row of a published file that this may be a copy of, and what says so.

    The hash, where the row has one; else the name and the size, where it is known; else the name.
    """
    for row in PUBLISHED:
        if row.sha256 and sha256.startswith(row.sha256):
            return row, BY_HASH
    for row in PUBLISHED:
        if row.filename == path.name and row.sha256 is None:
            if row.size is None:
                return row, "file name only"
            return (row, "file name and size") if row.size == path.stat().st_size else None
    return None
