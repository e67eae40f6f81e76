"""How PEFT learns of a method that is not its own, and how such a method finds its modules as PEFT would."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists


def register(peft_type: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Enters a method into PEFT's tables.

    PEFT's own function for this wants a member of its enumeration of methods, which is closed. The members are strings
    and compare as such, so that a plain string is found wherever PEFT looks a method up, also by the name in a saved
    configuration.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix


def targeted(name: str, wanted: Collection[str] | str, config: PeftConfig) -> bool | _ExcludedModule:
    """Whether a module is meant by `wanted`, the ends of names or one regular expression, given what `config` says of
    exclude_modules, modules_to_save and layers; an `_ExcludedModule`, which is false, where it excludes one.
    """
    matching = SimpleNamespace(
        target_modules=wanted,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=getattr(config, "layers_pattern", None),
    )
    return check_target_module_exists(matching, name)
