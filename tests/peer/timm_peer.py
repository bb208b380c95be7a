"""pytest plugin: points timm's own ``tests/test_models.py`` at our models, the file unmodified.

Loaded with ``-p timm_peer``, that is before collection, in a process of its own. timm's tests take
their models from ``timm.list_models(...)`` when they are imported, so replacing that function is
enough for most; a few more would hold for any model but name timm's, and those get our names as
parameters. The rest check one timm model or one timm layer and are deselected, each listed below
with its reason. A test in none of the lists is reported as unknown: a new timm release is then
looked at instead of being passed over.

Environment:
    VITLINEAR_PEER_PACKAGE: the package whose models are tested, imported here (``vitlinear``).
    VITLINEAR_PEER_MODELS: names or wildcards of models, comma separated, or ``all`` (``test_*``).
    VITLINEAR_PEER_IN_TURN: if set, models take turns with the tests of `IN_TURN`.
    VITLINEAR_PEER_REPORT: where to write what happened, as JSON; see :func:`pytest_sessionfinish`.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import timm.models._registry as registry

PACKAGE = os.environ.get("VITLINEAR_PEER_PACKAGE", "vitlinear")
DEFAULT_MODELS = "test_*"

# timm recognises its token models by a list of names; this entry of it tells that list apart.
TOKEN_LIST_SENTINEL = "naflexvit*"

# Tests whose model lists come from list_models(): the contract every model of ours must pass.
CONTRACT = frozenset(
    {
        "test_model_forward",
        "test_model_backward",
        "test_model_default_cfgs",
        "test_model_forward_torchscript",
        "test_model_forward_features",
        "test_model_forward_intermediates_features",
        "test_model_forward_intermediates",
        "test_prune_intermediate_layers_contract",
        "test_model_forward_fx",
        "test_model_backward_fx",
        "test_model_forward_fx_torchscript",
    }
)
CONTRACT_TOKEN = (CONTRACT - {"test_model_default_cfgs", "test_model_forward_features"}) | {
    "test_model_default_cfgs_non_std"
}
# Tests that name timm's models but hold for any: they are given ours instead. A value is what goes
# beside each model name where the test takes more than the name.
REPOINTED: dict[str, tuple[Any, ...]] = {
    "test_model_init_weights_after_to_empty": ({},),
    "test_prune_intermediate_layers_params_used": (),
}
# As above, where the test also asks for what only map-like features have: every pooling, strides,
# a norm that is not for each block's features, features_only without timm's FeatureGetterNet, which
# has no set_grad_checkpointing.
REPOINTED_MAPS: dict[str, tuple[Any, ...]] = {
    "test_features_only_grad_checkpointing_backward": (),
    "test_forward_intermediates_stop_early_final_norm": ({},),
    "test_head_hidden_size": ({},),
    "test_reset_classifier_keeps_pool": (),
}

# Pairs of tests that take half of the time: both of a pair trace with torch.fx, or cut off layers.
# Where models take turns, each runs one of every pair, and its neighbours in the list the other.
IN_TURN = (
    ("test_model_forward_fx_torchscript", "test_model_backward_fx"),
    ("test_prune_intermediate_layers_contract", "test_prune_intermediate_layers_params_used"),
)

# Why a test is not run: it checks something that only timm has.
DESELECTED: dict[str, tuple[str, ...]] = {
    "downloads published weights": (
        "test_model_inference",
        "test_model_load_pretrained",
        "test_model_features_pretrained",
    ),
    "checks a feature of one timm model or family": (
        "test_catavgmax_unsupported",
        "test_convit_dtype_change_after_forward",
        "test_efficientvim_branch_features",
        "test_eva_reset_classifier_removes_attention_pool",
        "test_feature_getter_stage_ends_torchscript",
        "test_feature_hook_net_grad_checkpointing_order",
        "test_features_only_feature_cls_class",
        "test_forward_after_prune_intermediate_layers",
        "test_gcvit_batch_consistency",
        "test_gemma4_forward_intermediates_dict_output",
        "test_headless_checkpoint_reload",
        "test_hybrid_vit_set_input_size_dtype",
        "test_inception_v3_aux_logits_reset_prune",
        "test_mobile_model_fusion_features",
        "test_mobilenetv5_intermediate_final_features",
        "test_model_features_output_stride",
        "test_model_features_space2depth_reduction",
        "test_model_forward_torchscript_with_features_fx",
        "test_nfnet_stem_feature_consistency",
        "test_prune_class_token_avg_pool",
        "test_prune_extra_blocks_stem_width",
        "test_prune_intermediate_layers_last_feature",
        "test_prune_to_stem_feature",
        "test_pruned_efficientnet_in_chans",
        "test_pruned_features_torchscript",
        "test_radio_checkpoint_filter",
        "test_resnet_pruned_grad_checkpointing",
        "test_resnetv2_stem_feature_odd_size",
        "test_samvit_feature_getter_channels",
        "test_vit_classifier_checkpoint",
        "test_vit_classifier_encoder_hooks",
        "test_vit_classifier_pruned_features",
    ),
    "checks timm's NaFlex ViT": (
        "test_naflexvit_direct_grid_sample_export",
        "test_naflexvit_direct_grid_sample_fullgraph",
        "test_naflexvit_direct_grid_sample_parity",
        "test_naflexvit_forward_intermediates_dict_input",
        "test_naflexvit_key_only_attn_mask_is_opt_in_and_post_patch_dropout",
        "test_naflexvit_key_only_attn_mask_output_parity",
        "test_naflexvit_mixed_rope_dict_input",
        "test_naflexvit_patch_interpolation_capability",
        "test_naflexvit_sapiens2_conversion",
    ),
    "checks timm's window attention, relative positions or attention-bias caches": (
        "test_attention_bias_cache_apply_preserves_recurse_argument",
        "test_eval_attention_bias_cache_after_dtype_change",
        "test_eval_attention_forward_after_dtype_change",
        "test_eval_refreshes_attention_bias_cache",
        "test_relpos_family_set_input_size",
        "test_relpos_non_square_checkpoint_reload",
        "test_relpos_non_square_set_input_size",
        "test_swin_family_compile_resize_guards",
        "test_swin_family_dynamic_mask_trace",
        "test_swin_family_reinit_after_to_empty",
        "test_swin_family_resize_metadata",
        "test_swin_family_resize_odd_stage_sizes",
        "test_swin_family_script_after_resize",
        "test_swin_family_set_input_size",
        "test_swin_family_set_input_size_after_pruning",
        "test_swin_family_set_input_size_invalid_and_min_windows",
        "test_swin_family_set_input_size_stage_windows",
        "test_swin_family_set_input_size_window_ratios",
        "test_swin_family_window_padding",
    ),
}
_REASON = {name: reason for reason, names in DESELECTED.items() for name in names}
_RUN = CONTRACT | CONTRACT_TOKEN | REPOINTED.keys() | REPOINTED_MAPS.keys()

_timm_list_models: Callable[..., list[str]] = registry.list_models


def our_models(package: str = PACKAGE, selection: str | None = None) -> list[str]:
    """Names of the models that ``package`` registered, narrowed by a selection of wildcards.

    Ownership is read off the entrypoint's module, not off the name: a model is ours if its
    function was defined in our package, whatever it is called.

    Args:
        package: the top-level package.
        selection: as VITLINEAR_PEER_MODELS, which is the default.
    """
    if selection is None:
        selection = os.environ.get("VITLINEAR_PEER_MODELS") or DEFAULT_MODELS
    wildcards = ["*" if part == "all" else part.strip() for part in selection.split(",")]
    return [
        name
        for name in _timm_list_models()
        if name != "replaced_attention"  # which needs the name of a model to change
        and f"{registry.model_entrypoint(name).__module__}.".startswith(f"{package}.")
        and any(fnmatch.fnmatch(name, wildcard) for wildcard in wildcards)
    ]


@functools.cache
def is_token_model(name: str) -> bool:
    """Whether the features of a model are tokens rather than maps at several strides.

    timm gives its own such models a laxer config test (their head may not take global_pool='') and
    no pyramid features test.
    """
    info = timm.create_model(name, device="meta").feature_info
    return len({level["reduction"] for level in info}) == 1


def required_tests(tokens: bool) -> frozenset[str]:
    """Which of timm's test functions must run, and pass, for a model.

    Args:
        tokens: Its features are tokens; see `is_token_model`.
    """
    if tokens:
        return CONTRACT_TOKEN | REPOINTED.keys()
    return CONTRACT | REPOINTED.keys() | REPOINTED_MAPS.keys()


def left_out(models: Iterable[str]) -> frozenset[tuple[str, str]]:
    """Which tests of which models do not run where they take turns; see `IN_TURN`."""
    return frozenset(
        (pair[place % 2], model) for place, model in enumerate(sorted(models)) for pair in IN_TURN
    )


def _as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value)


def _list_our_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """Stands in for ``timm.list_models``: the same question, asked of our models only."""
    include, exclude = _as_list(filter), _as_list(exclude_filters)
    # timm lists its own token models by name; ours are asked.
    tokens = [name for name in sorted(_ours) if is_token_model(name)]
    if TOKEN_LIST_SENTINEL in include:
        if not tokens:
            return []
        include = tokens
    if TOKEN_LIST_SENTINEL in exclude:
        exclude = tokens
    # `module` holds timm's file names (those with forward_intermediates); all of ours qualify.
    listed = _timm_list_models(
        filter=include,
        pretrained=pretrained,
        exclude_filters=exclude,
        name_matches_cfg=name_matches_cfg,
        include_tags=include_tags,
    )
    return [name for name in listed if name.split(".")[0] in _ours]


def _model_of(item: pytest.Item) -> str | None:
    """The model of ours that a test runs on, without its tag; None if it runs on none."""
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("model_name") if callspec else None
    return name.split(".")[0] if isinstance(name, str) and name.split(".")[0] in _ours else None


# What one run has seen, for the report.
_ours: set[str] = set()
_results: list[dict[str, str]] = []
_deselected: dict[str, str] = {}
_unknown: set[str] = set()


def pytest_configure() -> None:
    """Registers our models and takes over ``list_models`` wherever timm's tests may find it.

    Here rather than at import, so that this module can also be imported for its tables.
    """
    importlib.import_module(PACKAGE)
    _ours.update(our_models())
    for holder in (timm, timm.models, registry):
        holder.list_models = _list_our_models


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Exchanges the model names of the repointed tests, in the mark they are parametrised with."""
    name = metafunc.function.__name__
    if name in REPOINTED:
        models, beside = sorted(_ours), REPOINTED[name]
    elif name in REPOINTED_MAPS:
        models = sorted(m for m in _ours if not is_token_model(m))
        beside = REPOINTED_MAPS[name]
    else:
        return
    marks = metafunc.definition.own_markers
    index = next(i for i, mark in enumerate(marks) if mark.name == "parametrize")
    values = [(model, *beside) if beside else model for model in models]
    marks[index] = pytest.mark.parametrize(marks[index].args[0], values).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that run on our models, and notes why each of the others does not."""
    kept, dropped = [], []
    others = left_out(_ours) if os.environ.get("VITLINEAR_PEER_IN_TURN") else frozenset()
    for item in items:
        name = getattr(item, "originalname", item.name)
        if name in _REASON:
            _deselected[name] = _REASON[name]
        elif name not in _RUN:
            _unknown.add(name)
        if name in _RUN and _model_of(item) and (name, _model_of(item)) not in others:
            kept.append(item)
        else:
            dropped.append(item)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Records the outcome of every test, and of set-up or tear-down where that is what failed."""
    report = yield
    if report.when == "call" or not report.passed:
        detail = report.longrepr[2] if report.skipped and report.longrepr else ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            detail = (crash.message if crash else str(report.longrepr)).strip()
        _results.append(
            {
                "test": getattr(item, "originalname", item.name),
                "model": _model_of(item) or "",
                "outcome": report.outcome,
                "detail": detail,
            }
        )
    return report


def pytest_sessionfinish() -> None:
    """Writes the report: models, results, deselected names with reasons, unknown names."""
    path = os.environ.get("VITLINEAR_PEER_REPORT")
    if path:
        report = {
            "timm": timm.__version__,
            "models": sorted(_ours),
            "token_models": [name for name in sorted(_ours) if is_token_model(name)],
            "results": _results,
            "deselected": _deselected,
            "unknown": sorted(_unknown),
        }
        Path(path).write_text(json.dumps(report, indent=1))
