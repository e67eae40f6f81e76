"""How PEFT learns of a method that is not its own."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner


def register(peft_type: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Enters a method into PEFT's tables.

    PEFT's own function for this wants a member of its enumeration of methods, which is closed. The members are strings
    and compare as such, so that a plain string is found wherever PEFT looks a method up, also by the name in a saved
    configuration.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix
