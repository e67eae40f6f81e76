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
        for name, weight in model.named_parameters():
            if weight.numel() == 0:
                raise UserError(
                    f"{settings.model}: the model cannot be built: {name} has no elements, its shape is "
                    f"{list(weight.shape)}."
                )
        if fourbit is not None:
            _quantize(model, fourbit)
        parameters, _ = methods.base_size(model)
        return methods.adapt(model, settings, batches=()).model, parameters


def _quantize(model, config) -> None:
    """Puts those weights into 4 or 8 bits that loading the model with `config`, a FourBitConfig, would."""
    import torch

    from peftfast.integrations.experts import FourBitExperts, projections
    from peftfast.integrations.transformers import FourBitHfQuantizer
    from peftfast.nn.quantized import QuantizedLayer

    first = {}  # the first layer with a weight, by the weight: tied ones share it still
    owners = {
        name: first.setdefault(module.weight, name)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    quantizer = FourBitHfQuantizer(config, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model)
    model.is_loaded_in_4bit = True  # as transformers tells PEFT
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            if owners[name] != name:
                module.share(model.get_submodule(owners[name]))
            elif module.bits == 8:
                module.assign(_empty_eightbit(module.shape))
            else:
                module.assign(_empty_fourbit(module.shape, model.dtype, config))
        elif isinstance(module, FourBitExperts):
            for projection in projections(module):
                shape = quantizer.experts.get(f"{name}.{projection}")
                if shape is not None:
                    module.set_fourbit_weight(projection, _empty_fourbit(shape, model.dtype, config))


def _empty_eightbit(shape: Sequence[int]):
    import torch

    from peftfast.ops import EightBitWeight

    return EightBitWeight(
        torch.empty(shape, dtype=torch.int8, device="meta"), torch.empty(shape[0], device="meta")
    )


def _empty_fourbit(shape: Sequence[int], dtype, config):
    import torch

    from peftfast.ops import FourBitWeight, NestedAbsmax
    from peftfast.reference import NESTED_BLOCKSIZE

    empty = functools.partial(torch.empty, device="meta")
    count, nested = math.prod(shape), None
    blocks = math.ceil(count / config.blocksize)
    if config.nested:
        nested = NestedAbsmax(empty(math.ceil(blocks / NESTED_BLOCKSIZE)), empty(256), empty(()))
    packed = empty((count + 1) // 2, 1, dtype=torch.uint8)
    absmax = empty(blocks, dtype=torch.uint8 if config.nested else torch.float32)
    return FourBitWeight(packed, absmax, tuple(shape), dtype, config.quant_type, config.blocksize, nested)
