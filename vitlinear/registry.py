"""The scope ``vitlinear`` of OpenMMLab's packages: its registries and its configs.

mmengine imports this module by its name when it meets ``type='vitlinear.Backbone'``, and needs
nothing else to find it, whichever of mmdet and mmseg asks. ``import vitlinear.registry`` before
``get_config('vitlinear::detection/...')`` or a config with such a ``_base_``: mmengine reads only
the configs of packages that it knows.
"""

from typing import Any

from mmengine import registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DefaultScope

SCOPE = "vitlinear"
# mmengine imports the locations when something is first looked up.
LOCATIONS = ["vitlinear.dense.openmmlab"]

MODULE2PACKAGE[SCOPE] = "vitlinear"


class ScopeRegistry(registry.Registry):
    """A registry of ours that hands on what is not ours to the scope around it, mmdet or mmseg.

    mmengine builds all that a config inherits from ``vitlinear::...`` in our scope, and would look
    there for the parts that are mmdet's or mmseg's.
    """

    def get(self, key: str) -> Any:
        """Returns what is registered under a name, or None."""
        self.import_from_location()
        if key not in self.module_dict and self.split_scope_key(key)[0] is None:
            scopes = [scope.scope_name for scope in DefaultScope._instance_dict.values()]
            around = next((scope for scope in reversed(scopes) if scope != SCOPE), None)
            if around is not None:
                with self.switch_scope_and_registry(around) as other:
                    if other is not self:  # as it is where that scope has none of this kind
                        return other.get(key)
        return super().get(key)


# One of each kind: mmengine would complain of a kind that a scope is without.
REGISTRIES = {
    name: ScopeRegistry(parent.name, parent=parent, scope=SCOPE, locations=LOCATIONS)
    for name, parent in vars(registry).items()
    if isinstance(parent, registry.Registry)
}
MODELS = REGISTRIES["MODELS"]
OPTIM_WRAPPER_CONSTRUCTORS = REGISTRIES["OPTIM_WRAPPER_CONSTRUCTORS"]


# Functions, which import mmdet and mmseg only when asked: neither needs the other.
@MODELS.register_module(name="DetDataPreprocessor")
def _detection(**kwargs: Any) -> Any:
    from vitlinear.dense.openmmlab.det_preprocessor import DetDataPreprocessor

    return DetDataPreprocessor(**kwargs)


@MODELS.register_module(name="SegDataPreProcessor")
def _segmentation(**kwargs: Any) -> Any:
    from vitlinear.dense.openmmlab.seg_preprocessor import SegDataPreProcessor

    return SegDataPreProcessor(**kwargs)
