"""A registered model as the backbone of a detector or segmenter: maps of several scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitlinear.checkpoints.card import Card, read_card
from vitlinear.checkpoints.load import named_for, notice_of_other_model, read_weights
from vitlinear.checkpoints.read import CheckpointError
from vitlinear.checkpoints.translate import classifiers
from vitlinear.create import build_model
from vitlinear.errors import UserError, one_line
from vitlinear.layers.band import LOCAL
from vitlinear.models._contract import TimmBackbone

from .padding import padding, valid_sizes_of, zero_padding
from .pyramid import SimpleFeaturePyramid, checked_indices


class MultiScaleBackbone(nn.Module):
    """A model without its classifier; gives the maps of its stages.

    Models of four stages give what the stages put out, at strides 4, 8, 16 and 32. Models of one
    resolution (LinearDeiT, InLine-DeiT, LightNet, ViT³) give the maps of a `SimpleFeaturePyramid`
    on what their last block puts out, without the final norm, at the same strides. Other models of
    timm with ``forward_intermediates`` work likewise; their levels are those that timm names.

    What no map needs is removed, so that training leaves no parameter without a gradient.

    Attributes:
        model: The timm model; parameters have the names that they have in a classifier.
        pyramid: The `SimpleFeaturePyramid`, or None.
        norms: A `LayerNorm2d` for each map under its index; empty without ``out_norms``.
        channels: Channels of each map, C_i.
        reductions: Stride of each map in pixels.
    """

    row_rule = LOCAL

    def __init__(
        self,
        model: str,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_norms: bool = False,
        out_norm_eps: float = 1e-6,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        pretrained: bool = False,
        checkpoint_path: str | Path | None = None,
        **model_args: Any,
    ) -> None:
        """Make the backbone.

        Args:
            model: Name in timm's registry, with or without a tag.
            out_indices: Maps to give, ascending, or a single one; 0 is the finest.
            out_norms: Put each map through a layer norm of its own, over channels; so the authors
                of RALA, MALA, L2ViT and MILA do for detection and segmentation.
            out_norm_eps: Of those norms: 1e-6 in RALA and MALA, 1e-5 in L2ViT and MILA.
            frozen_stages: -1 trains everything; 0 freezes all that comes before the stages, n
                also the first n stages (blocks, in models of one resolution). What is frozen stays
                in eval mode, with its running statistics. The pyramid and `norms` are trained.
            norm_eval: Keep all batch norms of the model in eval mode.
            grad_checkpointing: Recompute blocks during backward instead of keeping activations.
            pretrained: Load the weights that timm's registry names.
            checkpoint_path: File of weights to load instead: ours or the authors', of a
                classifier, or of the stages of a detector. Arguments of the model that ours names,
                and the channels of its images, are taken from it.
            **model_args: For `timm.create_model`: ``drop_path_rate``, ``attn_backend``,
                ``img_size``, ``pretrained_cfg_overlay``, ...

        Raises:
            UserError: There is no such model, level or stage, or the model cannot be built so;
                the weights cannot be fetched or do not fit.
        """
        super().__init__()
        if pretrained and checkpoint_path is not None:
            raise UserError("give pretrained=True or a checkpoint_path, not both")
        card = read_card(Path(checkpoint_path)) if checkpoint_path is not None else None
        if card is not None:
            model_args = {**card.backbone_args(), **model_args}
        timm_model: Any = build_model(model, pretrained=pretrained, num_classes=0, **model_args)
        self.model = timm_model
        info = _feature_info(self.model, model)
        isotropic = len(info) > 1 and len({level["reduction"] for level in info}) == 1
        try:
            self.out_indices = checked_indices(out_indices, 4 if isotropic else len(info))
        except ValueError as error:
            raise UserError(f"{model}: {error}") from error

        self.indices = [len(info) - 1] if isotropic else list(self.out_indices)
        if checkpoint_path is not None:
            weights = _read_weights(self.model, checkpoint_path, card)
        timm_model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        if isinstance(timm_model, TimmBackbone):
            timm_model.use_dense_form()
        if checkpoint_path is not None:
            _load_weights(self.model, weights, checkpoint_path)
            if card is not None:
                name = model.partition(".")[0]
                notice_of_other_model(Path(checkpoint_path), card, name, model_args)

        dd: dict[str, Any] = {key: model_args.get(key) for key in ("device", "dtype")}
        self.pyramid: SimpleFeaturePyramid | None = None
        if isotropic:
            dim, stride = info[-1]["num_chs"], info[-1]["reduction"]
            try:
                self.pyramid = SimpleFeaturePyramid(dim, self.out_indices, **dd)
            except ValueError as error:
                raise UserError(f"{model}: {error}") from error
            self.channels = self.pyramid.channels
            self.reductions = tuple(int(stride * scale) for scale in self.pyramid.scales)
        else:
            self.channels = tuple(info[index]["num_chs"] for index in self.indices)
            self.reductions = tuple(info[index]["reduction"] for index in self.indices)
        self.norms = nn.ModuleDict()
        if out_norms:
            for index, width in zip(self.out_indices, self.channels, strict=True):
                self.norms[str(index)] = LayerNorm2d(width, eps=out_norm_eps, **dd)

        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self._freeze(model)
        if grad_checkpointing:
            try:
                timm_model.set_grad_checkpointing(True)
            except (AttributeError, AssertionError) as error:
                raise UserError(f"{model} has no gradient checkpointing") from error
        self.train()

    def forward(
        self, images: Tensor, valid_sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, ...]:
        """Images [B, in_chans, H, W] -> maps [B, C_i, H_i, W_i], H_i = ceil(H / reduction).

        A model of one resolution rounds up to its patches first, so that its finer maps may have
        more rows and columns than that; InLine-PVT and Pola-PVT leave incomplete patches out,
        as released.

        Args:
            images: Normalised as the model wants it.
            valid_sizes: Height and width in pixels of each image, if the batch has been padded to
                the right and below; by default what `attach_valid_sizes` noted on it. The valid
                part of a map is then that of the image alone, with the exceptions that
                `vitlinear.dense.padding` lists, and the rest of it is zero. Other models than ours
                do not look at the note.

        Raises:
            UserError: The sizes do not fit the images, or the model is not one of ours.
        """
        if valid_sizes is None and isinstance(self.model, TimmBackbone):
            valid_sizes = valid_sizes_of(images)
        with padding(self, images.shape[-2:], valid_sizes):
            maps = self.model.forward_intermediates(
                images, indices=self.indices, stop_early=True, intermediates_only=True
            )
            if self.pyramid is not None:
                maps = self.pyramid(maps[0])
            if self.norms:
                maps = [norm(x) for norm, x in zip(self.norms.values(), maps, strict=True)]
            return tuple(zero_padding(x) for x in maps)

    def train(self, mode: bool = True) -> MultiScaleBackbone:
        """Set the mode; what is frozen, and batch norms with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _stages(self) -> tuple[str, list[nn.Module]]:
        """The stages that `frozen_stages` counts, after the name that holds them."""
        for name in ("stages", "blocks"):
            if isinstance(stages := getattr(self.model, name, None), nn.Module):
                return name, list(stages.children())
        return "", []

    def _frozen_modules(self) -> Iterator[nn.Module]:
        if self.frozen_stages >= 0:
            name, stages = self._stages()
            yield from (part for key, part in self.model.named_children() if key != name)
            yield from stages[: self.frozen_stages]

    def _freeze(self, model: str) -> None:
        name, stages = self._stages()
        most = len(stages) if stages else -1
        if not -1 <= self.frozen_stages <= most:
            raise UserError(
                f"frozen_stages of {model} must be from -1 to {most}, got {self.frozen_stages}"
            )
        if self.frozen_stages >= 0:
            # By name: positions and class tokens are in no module of their own.
            for key, parameter in self.model.named_parameters():
                parameter.requires_grad_(key.startswith(f"{name}."))
            for module in self._frozen_modules():
                module.requires_grad_(False)


def _feature_info(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """For each level of the model its channels and reduction."""
    methods = ("forward_intermediates", "prune_intermediate_layers")
    info = getattr(model, "feature_info", None)
    if not info or not all(hasattr(model, method) for method in methods):
        raise UserError(f"{name} gives no maps of its stages: it lacks timm's {methods[0]}")
    return list(info)


def _read_weights(model: nn.Module, path: str | Path, card: Card | None) -> dict[str, Tensor]:
    """A checkpoint in the keys of a model that is whole but for its classifier."""
    weights = named_for(model, read_weights(Path(path)), Path(path), card)
    heads = tuple(f"{name}." for name in classifiers(model))
    known = model.state_dict().keys()
    extra = sorted(key for key in weights.keys() - known if not key.startswith(heads))
    if extra:
        raise CheckpointError(
            f"checkpoint {path} is of another model: {len(extra)} unexpected tensors, "
            f"such as {extra[0]}"
        )
    return weights


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load what is left of a pruned model."""
    own = model.state_dict()
    try:
        model.load_state_dict({key: weights[key] for key in own if key in weights})
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {path} does not fit: {one_line(error)[:300]}") from error
