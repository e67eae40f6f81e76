"""4-bit models in transformers: quantized while they load, and bitsandbytes' checkpoints read and written without it.

Importing this module registers `FourBitConfig` with transformers. Where bitsandbytes is not installed, it also takes
its place: checkpoints and configurations of bitsandbytes' 4-bit kind then load into `peftfast.nn.Linear4bit`.
"""

from __future__ import annotations

import importlib.util
import math
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations import is_fsdp_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftfast.integrations.experts import (
    FourBitExperts,
    become_dense,
    become_fourbit,
    is_experts,
    projections,
    quantized_parameters,
)
from peftfast.nn import eightbit
from peftfast.nn.embeddings import check_embeddings, counterpart
from peftfast.nn.fourbit import ENTRIES, Linear4bit, check_format, unpack_state
from peftfast.nn.quantized import QuantizedLayer
from peftfast.ops import FourBitWeight, fourbit_quantize
from peftfast.ops.lora import name_of

METHOD = "peftfast_4bit"


@register_quantization_config(METHOD)
@dataclass
class FourBitConfig(QuantizationConfigMixin):
    """Loads a model with its linear layers and experts in 4 bits, or one that bitsandbytes saved, without bitsandbytes.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=peftfast.FourBitConfig())

    A dense checkpoint is quantized while it loads, tensor by tensor; experts after transformers has stacked those of a
    projection. Of one that is in 4 bits already, the bytes stay as they are, and of this configuration only
    `compute_dtype` is used; experts that bitsandbytes left dense stay dense. What `save_pretrained` writes,
    bitsandbytes reads, unless there are experts in 4 bits or quantized embeddings, which it has no form for: they are
    written, experts stacked, and config.json then asks for this configuration.

    Args:
        quant_type: "nf4" or "fp4".
        blocksize: elements of the flattened weight to one scale; a power of two from 32 to 4096.
        nested: the scales are quantized too, to 8 bits ("double quantization").
        compute_dtype: of the products; None: that which the checkpoint names, else the model's. A float32 in a
            checkpoint names nothing: it is what bitsandbytes writes when nobody chose.
        skip_modules: names of modules that stay dense, as in transformers' BitsAndBytesConfig, or of projections of
            experts ("experts.down_proj"). None: the output embeddings. What shares its weight with the embeddings
            stays dense in any case, unless they are quantized.
        embeddings: "4bit", as the linear layers, or "8bit", a scale to a row: the format of the input embeddings, the
            output embeddings and what shares its weight with them, and shares it still. None: all dense.
    Raises:
        TypeError, ValueError: an argument is not usable; the message names it.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = True
    compute_dtype: torch.dtype | str | None = None
    skip_modules: list[str] | None = None
    embeddings: str | None = None

    quant_method: str = field(default=METHOD, init=False, repr=False)
    # Whether the model has experts in 4 bits; found out while it loads.
    has_experts: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.compute_dtype, str):
            self.compute_dtype = getattr(torch, self.compute_dtype, self.compute_dtype)
        check_format(self.quant_type, self.blocksize, self.nested, self.compute_dtype)
        if self.skip_modules is not None and (
            isinstance(self.skip_modules, str) or not all(isinstance(name, str) for name in self.skip_modules)
        ):
            raise TypeError(f"skip_modules must be None or a list of names, got {self.skip_modules!r}.")
        if self.embeddings is not None:
            check_embeddings(self.embeddings)

    def to_dict(self) -> dict:
        """What config.json says of it: a configuration of bitsandbytes', and the block size, which it reads nowhere.

        With experts in 4 bits or quantized embeddings the same under another name: bitsandbytes could not load them.
        """
        own = {} if self.embeddings is None else {"embeddings": self.embeddings}
        theirs = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
        return ({"quant_method": METHOD} | own if self.has_experts or own else theirs) | {
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_blocksize": self.blocksize,
            "bnb_4bit_use_double_quant": self.nested,
            "bnb_4bit_compute_dtype": self.compute_dtype and name_of(self.compute_dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.skip_modules,
        }

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """Of what `to_dict` gives, or a configuration of bitsandbytes'.

        Raises:
            ValueError: it is of another kind; the message says of which.
        """
        if not config_dict.get("load_in_4bit") and config_dict.get("quant_method") != METHOD:
            kind = "8 bits" if config_dict.get("load_in_8bit") else config_dict.get("quant_method")
            raise ValueError(
                f"FourBitConfig reads bitsandbytes' 4-bit checkpoints, but this one is in {kind}."
            )
        compute_dtype = config_dict.get("bnb_4bit_compute_dtype")
        config = cls(
            quant_type=config_dict.get("bnb_4bit_quant_type", "fp4"),
            blocksize=config_dict.get("bnb_4bit_blocksize", 64),
            nested=config_dict.get("bnb_4bit_use_double_quant", False),
            compute_dtype=None if compute_dtype == "float32" else compute_dtype,
            skip_modules=config_dict.get("llm_int8_skip_modules"),
            embeddings=config_dict.get("embeddings"),
        )
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(METHOD)
class FourBitHfQuantizer(HfQuantizer):
    """Puts linear layers and experts into 4 bits while transformers loads a model."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs) -> None:
        if isinstance(quantization_config, FourBitConfig):
            config = copy(quantization_config)  # facts of the model go into it; the caller may use his again
        else:
            config = FourBitConfig.from_dict(quantization_config.to_dict())
        super().__init__(config, **kwargs)
        # transformers swallows what a conversion raises: kept here until all is loaded.
        self.error: Exception | None = None
        # Layers whose dense weights are Conv1D's, [in_features, out_features].
        self.transposed: set[Linear4bit] = set()
        # The parameters of experts to quantize, with their shapes.
        self.experts: dict[str, torch.Size] = {}

    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes that an element of a weight will take, by which transformers places layers on devices."""
        return None if self.pre_quantized else 0.5

    def validate_environment(self, device_map=None, **kwargs) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map sends modules to disk, where a 4-bit model cannot be offloaded.")

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return (isinstance(module, QuantizedLayer) and name == "weight") or param_name in self.experts

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        _refuse_partial_loading(model)
        config = self.quantization_config
        if config.compute_dtype is None:
            config.compute_dtype = model.dtype
        embeddings = self._embeddings(model) if config.embeddings else {}
        for name, module in embeddings.items():
            format = dict(quant_type=config.quant_type, blocksize=config.blocksize, nested=config.nested)
            layer = counterpart(module, name, config.embeddings, compute_dtype=config.compute_dtype, **format)
            self._put(model, name, layer, module.weight)
        if config.skip_modules is not None:
            tied = model.all_tied_weights_keys
            shared = {key.removesuffix(".weight") for key in (*tied, *tied.values())}
            config.skip_modules = sorted({*config.skip_modules, *(shared - embeddings.keys())})
        skip = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        for name, module in list(model.named_modules()):
            if is_experts(module) and not self.pre_quantized:
                shapes = {f"{name}.{part}": getattr(module, part).shape for part in projections(module)}
                self.experts |= {
                    part: shape
                    for part, shape in shapes.items()
                    if should_convert_module(name, skip) and should_convert_module(part, skip)
                }
                if not shapes.keys().isdisjoint(self.experts):
                    become_fourbit(module, config.compute_dtype)
            if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
                continue
            if should_convert_module(name, skip):
                shape = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
                layer = Linear4bit(
                    *shape, module.bias is not None, quant_type=config.quant_type, blocksize=config.blocksize,
                    nested=config.nested, compute_dtype=config.compute_dtype, device="meta", dtype=module.weight.dtype,
                )  # fmt: skip
                if isinstance(module, Conv1D):
                    self.transposed.add(layer)
                self._put(model, name, layer, module.weight)

    def _put(self, model, name: str, layer: QuantizedLayer, dense: Tensor) -> None:
        """Puts an empty layer into the place of that of a dense weight."""
        if not self.pre_quantized:  # transformers casts what it loads to the dtype that it finds
            layer.weight = nn.Parameter(dense.detach(), requires_grad=False)
        # No initialization by transformers, which would draw normal values into the bytes.
        layer._is_hf_initialized = True
        model.set_submodule(name, layer)

    def _embeddings(self, model) -> dict[str, nn.Module]:
        """The input and output embeddings that are to be quantized, and what shares its weight with them."""
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
        tied = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in model.all_tied_weights_keys.items()
            if target.endswith(".weight")
        }
        found = {}
        for source in dict.fromkeys(tied.get(name, name) for name in names):
            group = [source, *(target for target, its in tied.items() if its == source)]
            skip = self.quantization_config.skip_modules or []
            dense = [name for name in group if not should_convert_module(name, skip)]
            if dense and len(dense) < len(group):
                others = ", ".join(name for name in group if name not in dense)
                raise ValueError(
                    f"skip_modules keeps {dense[0]} dense, but it shares its weight with {others}, of which "
                    f"embeddings={self.quantization_config.embeddings!r} says otherwise."
                )
            found |= {name: model.get_submodule(name) for name in group if not dense}
        return found

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.error is not None:
            raise self.error
        for name in self.experts:
            experts, projection = get_module_from_name(model, name)
            if projection not in experts.fourbit_weights:
                raise ValueError(f"{name} is missing from the checkpoint.")
        self.transposed.clear()
        self.experts.clear()
        config = self.quantization_config
        filled = {
            module.weight: module
            for module in model.modules()
            if isinstance(module, QuantizedLayer) and not module.is_empty
        }
        stacked = []
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer):
                if module.is_empty:  # transformers has tied its weight, but knows nothing of scales
                    if module.weight not in filled:
                        raise ValueError(f"{name}.weight is missing from the checkpoint.")
                    module.share(filled[module.weight])
                bias = getattr(module, "bias", None)
                if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                    nn.init.zeros_(bias)  # as transformers does where a bias is missing, and has told
                if module.bits == 4:
                    config.quant_type, config.blocksize = module.quant_type, module.blocksize
                    config.nested = module.nested
            elif isinstance(module, FourBitExperts):
                stacked += [f"{name}.{projection}" for projection in module.fourbit_weights]
                for weight in module.fourbit_weights.values():
                    config.quant_type, config.blocksize = weight.quant_type, weight.blocksize
                    config.nested = weight.nested is not None
        config.has_experts = bool(stacked)
        # Saving is no loading in reverse: the layers write their entries themselves, and experts stay stacked.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(operation, _Fill) for operation in getattr(conversion, "operations", ()))
            and not (
                isinstance(conversion, WeightConverter)
                and any(target in name for target in conversion.target_patterns for name in stacked)
            )
        ]
        model.is_loaded_in_4bit = True
        return model

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, Tensor] | None, dict]:
        """Of a weight that layers share, transformers writes the codes once; here it learns of the scales."""
        tied = [
            target.removesuffix(".weight")
            for target, source in model.all_tied_weights_keys.items()
            if isinstance(get_module_from_name(model, target)[0], QuantizedLayer)
            and model.get_parameter(target) is model.get_parameter(source)
        ]
        if not tied:
            return None, {}
        entries = tuple(f"{name}.{entry}" for name in tied for entry in ("weight", eightbit.SCALES))
        return {key: value for key, value in model.state_dict().items() if not key.startswith(entries)}, {}

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        names = [
            f"weight{entry}" for entry in reversed(ENTRIES)
        ]  # the shortest last: the first that fits is taken
        if self.quantization_config.embeddings == "8bit":
            names.insert(0, eightbit.SCALES)
        return [WeightConverter(names, "weight", [_Deserialize(self)])] if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list, model) -> list:
        if not self.pre_quantized:
            return weight_conversions
        names = [
            f"{name}.{projection}"
            for name, module in model.named_modules()
            if is_experts(module)
            for projection in projections(module)
        ]
        # Before the model's own, which may fit the entries too; what those do to dense experts is done here then.
        stacked = {}
        for name in names:
            place = "".join(rf"\.{part}" for part in name.split(".")[-2:])
            own = (c.operations for c in weight_conversions if _fits(c, name))
            operation = _DeserializeExperts(self, place, next(own, []))
            stacked[place] = WeightConverter(
                [place + entry for entry in reversed(ENTRIES)], place, [operation]
            )
        return [*stacked.values(), *weight_conversions, *self.get_weight_conversions()]

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        dense: dict[Tensor, nn.Parameter] = {}  # what is shared stays so
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLayer):
                if module.weight not in dense:
                    dense[module.weight] = nn.Parameter(module.dequantize(dtype), requires_grad=False)
                with torch.device("meta"):
                    if isinstance(module, nn.Embedding):
                        layer = nn.Embedding(*module.shape, padding_idx=module.padding_idx)
                    else:
                        layer = nn.Linear(module.in_features, module.out_features, bias=False)
                        layer.bias = module.bias
                layer.weight = dense[module.weight]
                model.set_submodule(name, layer.train(module.training))
            elif isinstance(module, FourBitExperts):
                become_dense(module, dtype)
        model.is_loaded_in_4bit = False
        return model


def _refuse_partial_loading(model) -> None:
    """Blocks of a 4-bit weight, and the statistics of them all, are cut from the whole weight.

    Raises:
        ValueError: the processes load parts of the model, or one of them all.
    """
    how = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(how, name, 1) or 1 for name in ("tp_size", "ep_size", "pp_size", "fsdp_size")}
    spread = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if spread:
        raise ValueError(
            f"A 4-bit model cannot be loaded with distributed_config ({', '.join(spread)}), by which each process "
            "loads a part of it: load it whole, and shard it by FSDP afterwards."
        )
    if is_fsdp_enabled():
        raise ValueError(
            "A 4-bit model cannot be loaded with FSDP's cpu_ram_efficient_loading, by which only one process loads it: "
            "switch that off."
        )


def _fits(conversion, name: str) -> bool:
    return isinstance(conversion, WeightConverter) and conversion.compiled_sources.search(name) is not None


class _Fill(ConversionOps):
    """Fills layers; the first error is kept for the end of the loading, and spares what comes after it."""

    target: str | None = None  # the name that transformers expects of a result, where not the full one

    def __init__(self, hf_quantizer: FourBitHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> _Fill:
        return self  # transformers makes a copy for each weight; the errors are to be found in one place

    def convert(self, input_dict: dict, model=None, full_layer_name: str | None = None, **kwargs) -> dict:
        state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module, _ = get_module_from_name(model, full_layer_name)
        weight = None
        if self.hf_quantizer.error is None:
            try:
                weight = self.fill(model, module, state, full_layer_name)
            except Exception as error:  # transformers would swallow it
                self.hf_quantizer.error = error
        if weight is None:  # nobody will see it, but transformers goes on with it to the end
            weight = torch.empty_like(model.get_parameter_or_buffer(full_layer_name), device="cpu")
        return {self.target or full_layer_name: weight}


class _Quantize(_Fill):
    """A layer, or a projection of experts, from its dense weight."""

    def convert(self, input_dict: dict, model=None, full_layer_name: str | None = None, **kwargs) -> dict:
        if len(input_dict) == 1:
            return super().convert(input_dict, model, full_layer_name)
        results = dict(input_dict)  # of a conversion with several results
        for name in input_dict:
            if self.hf_quantizer.param_needs_quantization(model, name):
                results |= super().convert({name: input_dict[name]}, model, name)
        return results

    def fill(self, model, layer: nn.Module, state: dict, name: str) -> Tensor:
        (dense,) = state.values()
        if isinstance(layer, FourBitExperts):
            return self._fill_experts(layer, dense, name)
        layer.assign(layer.quantize(dense.T if layer in self.hf_quantizer.transposed else dense, name))
        return layer.weight

    def _fill_experts(self, experts: FourBitExperts, dense: Tensor, name: str) -> Tensor:
        config, shape = self.hf_quantizer.quantization_config, self.hf_quantizer.experts[name]
        if dense.shape != shape:
            raise ValueError(f"{name} has shape {list(dense.shape)}, expected {list(shape)}.")
        how = dict(quant_type=config.quant_type, blocksize=config.blocksize, nested=config.nested)
        try:
            quantized = fourbit_quantize(dense, **how)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("weight", name, 1)) from None
        projection = name.rpartition(".")[2]
        experts.set_fourbit_weight(projection, quantized)
        return getattr(experts, projection)


class _Deserialize(_Fill):
    """A layer from the entries of its 4-bit weight. transformers brings the weights of all other modules here too."""

    target = "weight"

    def fill(self, model, module: nn.Module, state: dict, name: str) -> Tensor:
        state = {key.removeprefix("weight"): value for key, value in state.items()}
        if isinstance(module, QuantizedLayer):
            if module.bits == 4:
                quantized = unpack_state(state, module.shape, name)
            else:
                names = [name, name.removesuffix("weight") + eightbit.SCALES]
                quantized = eightbit.unpack_state(
                    state.get(""), state.get(eightbit.SCALES), module.shape, names
                )
            module.assign(quantized)
            return module.weight
        if list(state) != [""]:
            bits = 8 if eightbit.SCALES in state else 4
            raise ValueError(
                f"{name} is in {bits} bits in the checkpoint, but dense in the model: see skip_modules."
            )
        return _cast(state[""], model, name)


class _DeserializeExperts(_Fill):
    """A projection of experts from its entries, or from dense weights, which stay dense after `operations`."""

    def __init__(self, hf_quantizer: FourBitHfQuantizer, place: str, operations: list[ConversionOps]) -> None:
        super().__init__(hf_quantizer)
        self.place, self.operations = place, operations

    def fill(self, model, experts: nn.Module, state: dict, name: str) -> Tensor:
        if list(state) == [self.place]:
            for operation in self.operations:
                state = operation.convert(
                    state, source_patterns=[self.place], target_patterns=[name], full_layer_name=name,
                    model=model, config=model.config,
                )  # fmt: skip
            (dense,) = state.values()
            return _cast(dense, model, name)
        state = {key.removeprefix(self.place): value for key, value in state.items()}
        projection = name.rpartition(".")[2]
        quantized = unpack_state(state, tuple(getattr(experts, projection).shape), name)
        if is_experts(experts):
            become_fourbit(experts, self.hf_quantizer.quantization_config.compute_dtype)
        experts.set_fourbit_weight(projection, quantized)
        return getattr(experts, projection)


def _cast(dense: Tensor, model, name: str) -> Tensor:
    """transformers itself casts no weight that it brings to a deserialization."""
    if any(part in name for part in model._get_dtype_plan(model.dtype)):  # what stays in float32
        return dense
    return dense.to(model.get_parameter_or_buffer(name).dtype)


def _merge(
    quantization_config, quantization_config_from_args, original=AutoHfQuantizer.merge_quantization_configs
):
    """transformers refuses a checkpoint's configuration and a caller's of two classes; ours reads bitsandbytes'."""
    if not isinstance(quantization_config_from_args, FourBitConfig):
        return original(quantization_config, quantization_config_from_args)
    if not isinstance(quantization_config, dict):
        quantization_config = quantization_config.to_dict()
    config = FourBitConfig.from_dict(quantization_config)
    asked = quantization_config_from_args.embeddings
    if asked not in (None, config.embeddings):
        held = "are dense" if config.embeddings is None else f"are in {config.embeddings[0]} bits"
        raise ValueError(
            f"embeddings={asked!r} was asked for, but the checkpoint is quantized already: they {held}."
        )
    config.compute_dtype = quantization_config_from_args.compute_dtype or config.compute_dtype
    return config


def _num_parameters(
    self,
    only_trainable: bool = False,
    exclude_embeddings: bool = False,
    original=PreTrainedModel.num_parameters,
) -> int:
    """transformers imports bitsandbytes to know 4-bit weights, and would count each byte of ours as one parameter."""
    weights = {
        weight: its for weight, its in quantized_parameters(self).items() if isinstance(its, FourBitWeight)
    }
    if not weights:
        return original(self, only_trainable, exclude_embeddings)
    marked = self.__dict__.pop("is_loaded_in_4bit", None)
    try:
        count = original(self, only_trainable, exclude_embeddings)
    finally:
        if marked is not None:
            self.is_loaded_in_4bit = marked
    if exclude_embeddings:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                weights.pop(module.weight, None)
    hidden = sum(math.prod(weight.shape) - weight.packed.numel() for weight in weights.values())
    return count if only_trainable else count + hidden


def _resize_token_embeddings(
    self, new_num_tokens: int | None = None, *args, original=PreTrainedModel.resize_token_embeddings, **kwargs
) -> nn.Embedding:
    """transformers would take the shape of packed codes for that of the weight.

    Raises:
        ValueError: embeddings that are quantized would have to change.
    """
    embeddings = self.get_input_embeddings()
    quantized = any(isinstance(end, QuantizedLayer) for end in (embeddings, self.get_output_embeddings()))
    multiple = args[0] if args else kwargs.get("pad_to_multiple_of")
    if not quantized or (new_num_tokens is None and multiple is None):
        return original(self, new_num_tokens, *args, **kwargs)
    count = getattr(embeddings, "num_embeddings", None)
    wanted = count if new_num_tokens is None else new_num_tokens
    if multiple is not None:
        wanted = math.ceil(wanted / multiple) * multiple
    if wanted != count:
        raise ValueError(
            f"resize_token_embeddings: the embeddings or the output head of this {type(self).__name__} are quantized "
            f"and stay {count} rows; resize and save the dense model, then load it with FourBitConfig."
        )
    return embeddings


# For good, since FourBitConfig and the models that it made are there whether or not peftfast is enabled. All others get
# the original.
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)
PreTrainedModel.num_parameters = _num_parameters
PreTrainedModel.resize_token_embeddings = _resize_token_embeddings
if importlib.util.find_spec("bitsandbytes") is None:
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = FourBitHfQuantizer
