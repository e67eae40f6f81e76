"""A model without memory, as `peftfast train` would have it: its real modules, on the meta device, for counting."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

from peftfast.cli import methods
from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.settings import TrainSettings


def is_quantized(config) -> bool:
    """Whether the checkpoint's weights are quantized."""
    return getattr(config, "quantization_config", None) is not None


def adapted_model(config, settings: TrainSettings) -> tuple:
    """The model with what its method trains, in 4 bits if told or if its checkpoint is, and its parameters before.

    Raises:
        UserError: it is no causal language model, or the settings do not go with it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from peftfast import FourBitConfig

    if settings.expert_share is not None:
        raise UserError(f"--experts {settings.experts} takes the model itself, not its configuration.")
    fourbit, config = methods.four_bit_config(settings), copy.deepcopy(config)
    if is_quantized(config):
        held = config.__dict__.pop("quantization_config")
        if fourbit is None:
            raise UserError(f"{settings.model}: its weights are quantized, which takes --method qlora.")
        try:
            fourbit = FourBitConfig.from_dict(held if isinstance(held, dict) else held.to_dict())
        except ValueError as error:
            raise UserError(f"{settings.model}: {first_sentence(error)}.") from error
    dtype = getattr(torch, methods.weights_dtype(settings))
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # whatever a library raises over a configuration
            raise UserError(
                f"{settings.model}: the model cannot be built: {first_sentence(error)}."
            ) from error
        if fourbit is not None:
            _quantize(model, fourbit)
        parameters, _ = methods.base_size(model)
        return methods.adapt(model, settings, batches=()).model, parameters


def empty_fourbit(
    shape: Sequence[int], dtype, quant_type: str, blocksize: int, nested: bool, device: str = "meta"
):
    """A FourBitWeight whose tensors hold no values that mean anything."""
    import torch

    from peftfast.ops import FourBitWeight, NestedAbsmax
    from peftfast.reference import NESTED_BLOCKSIZE

    empty = functools.partial(torch.empty, device=device)
    count, how = math.prod(shape), None
    blocks = math.ceil(count / blocksize)
    if nested:
        how = NestedAbsmax(empty(math.ceil(blocks / NESTED_BLOCKSIZE)), empty(256), empty(()))
    packed = empty((count + 1) // 2, 1, dtype=torch.uint8)
    absmax = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    return FourBitWeight(packed, absmax, tuple(shape), dtype, quant_type, blocksize, how)


def _quantize(model, config) -> None:
    """Puts those weights into 4 bits that loading the model with `config`, a FourBitConfig, would."""
    from peftfast.integrations.experts import FourBitExperts, projections
    from peftfast.integrations.transformers import FourBitHfQuantizer
    from peftfast.nn import Linear4bit

    quantizer = FourBitHfQuantizer(config, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model)
    model.is_loaded_in_4bit = True  # as transformers tells PEFT
    how = config.quant_type, config.blocksize, config.nested
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            shape = (module.out_features, module.in_features)
            module.assign(empty_fourbit(shape, model.dtype, *how))
        elif isinstance(module, FourBitExperts):
            for projection in projections(module):
                shape = quantizer.experts.get(f"{name}.{projection}")
                if shape is not None:
                    module.set_fourbit_weight(projection, empty_fourbit(shape, model.dtype, *how))
