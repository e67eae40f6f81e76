"""PEFT's prefix tuning, prompt tuning and p-tuning: once for the batch, checkpointed, and on packed batches.

A prefix is keys and values in front of a sequence. It does not depend on the sample, so it is projected once and every
sample gets a view of it. Checkpointed layers get theirs as an argument: reentrant checkpointing too returns its
gradient, and computing a layer again finds it as it was.

A prompt is a prefix that the model itself computes: virtual tokens see nothing but each other. Where that pays, they
run once for the batch and the samples start from their keys and values. The last of them runs with each sample, since
its output predicts the first token. The logits that are returned have PEFT's shape and values.

Attention to a cache takes a mask, and torch computes what it hides too. Where it hides nothing but the future,
attention runs without it, as among all tokens: the cached ones have queries of zeros, whose outputs are dropped.

Of a packed batch, every document sees the virtual tokens and itself. Its documents are where position_ids restart and
no attention_mask is given, as in transformers. PEFT leaves such batches to see across documents, and drops the
position_ids of prompts; both are honoured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from inspect import signature

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
)
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from peftfast.integrations.forwards import in_force, last_fallback, stand_in

NAME = "peft"
PREFIXES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
WITH_PREFIXES_ONLY = (
    PeftModelForSequenceClassification,
    PeftModelForSeq2SeqLM,
    PeftModelForTokenClassification,
    PeftModelForQuestionAnswering,
    PeftModelForFeatureExtraction,
)


def answers_for(module: nn.Module) -> bool:
    return isinstance(module, PeftModel) and module._is_prompt_learning


def kind_of(model: PeftModel) -> str:
    return f"{model.active_peft_config.peft_type.value.lower()}.{type(model).__name__}"


def always_on(model: PeftModel) -> bool:
    return False


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    yield PeftModel, "get_prompt", _get_prompt
    yield PeftModel, "_setup_prompt_encoder", _setup_prompt_encoder
    yield PeftModelForCausalLM, "forward", lambda original: _stand_in(original, _causal_forward)
    for kind in WITH_PREFIXES_ONLY:
        yield kind, "forward", lambda original: _stand_in(original, partial(_forward, original))


def _stand_in(original: Callable, fused: Callable) -> Callable:
    return stand_in(original, NAME, _at_rest, _why_not_call, fused)


def _get_prompt(original: Callable) -> Callable:
    """Computes a prefix once, for generation too."""

    def get_prompt(self, batch_size: int, *args, **kwargs):
        if self.active_peft_config.peft_type not in PREFIXES or not in_force(self)[0]:
            return original(self, batch_size, *args, **kwargs)
        cache = original(self, 1, *args, **kwargs)
        _expand(getattr(cache, "self_attention_cache", cache), batch_size)
        return cache

    return get_prompt


def _setup_prompt_encoder(original: Callable) -> Callable:
    """PEFT refuses a prefix on a model that is checkpointed already."""

    def setup(self, adapter_name: str) -> None:
        lifted = in_force(self)[0] and not self.base_model.config.is_encoder_decoder
        with _without_checkpointing(self.base_model) if lifted else nullcontext():
            original(self, adapter_name)

    return setup


def _forward(original: Callable, model: PeftModel, *args, **kwargs):
    """PEFT's own, whose prefix comes from `get_prompt`."""
    with _checkpointing_with_cache(model.base_model):
        return original(model, *args, **kwargs)


# ---- causal language models -----------------------------------------------------------------------------


def _causal_forward(
    model: PeftModelForCausalLM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | dict[str, Tensor] | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    task_ids: Tensor | None = None,
    **kwargs,
) -> ModelOutput | tuple:
    """As `PeftModelForCausalLM.forward` of a prefix or a prompt.

    Args:
        attention_mask: [samples, length]; or [samples, 1, length, length], bool or added to the scores, or a dict of
            such for each type of layer: then of the tokens alone, to which all virtual tokens are visible.
    Raises:
        ValueError: the virtual and the other tokens are more than the model has positions for.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    samples, length = given.shape[:2]
    position_ids = kwargs.pop("position_ids", None)
    _check_context(model, length, position_ids)
    documents = _documents(attention_mask, position_ids, samples)
    model._adjust_prompt_learning_kwargs(model.active_peft_config, kwargs=kwargs)
    kwargs |= dict(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
    inputs = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels, return_dict=return_dict)
    if model.active_peft_config.peft_type in PREFIXES:
        return _prefix_forward(model, given, attention_mask, position_ids, documents, inputs, kwargs)
    return _prompt_forward(model, attention_mask, position_ids, documents, inputs, kwargs)


def _prefix_forward(
    model: PeftModelForCausalLM,
    given: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    documents: Tensor | None,
    inputs: dict,
    kwargs: dict,
) -> ModelOutput | tuple:
    base, virtual = model.base_model, model.active_peft_config.num_virtual_tokens
    samples, length = given.shape[:2]
    if _is_checkpointed(base):
        kwargs["use_cache"] = False
    if position_ids is not None:
        kwargs["position_ids"] = position_ids + virtual
    cache = kwargs[_name_of_cache(base.forward)] = model.get_prompt(samples, max_cache_len=length + virtual)
    dtype = model.word_embeddings.weight.dtype
    with _checkpointing_with_cache(base):
        return base(
            **inputs,
            attention_mask=_mask(model, attention_mask, documents, virtual, cache, dtype, given),
            **kwargs,
        )


def _prompt_forward(
    model: PeftModelForCausalLM,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    documents: Tensor | None,
    inputs: dict,
    kwargs: dict,
) -> ModelOutput | tuple:
    base, virtual = model.base_model, model.active_peft_config.num_virtual_tokens
    embeds = inputs["inputs_embeds"]
    if embeds is None:
        embeds = model.word_embeddings(inputs["input_ids"])
    samples = embeds.shape[0]
    prompt = model.get_prompt(1)  # [1, virtual, H]; in its own dtype its gradient is summed over the batch
    shared = _shared(model, embeds, attention_mask, documents, kwargs)
    cache, shared_logits = _run_shared(base, prompt[:, :shared].to(embeds.dtype), samples)

    mask = _mask(model, attention_mask, documents, shared, cache, embeds.dtype, embeds)
    prompt = prompt[:, shared:].expand(samples, -1, -1).to(embeds.dtype)
    labels = inputs["labels"]
    if labels is not None:
        labels = pad(labels, (virtual - shared, 0), value=-100)
    if position_ids is not None:
        own = torch.arange(shared, virtual, device=position_ids.device).expand(len(position_ids), -1)
        kwargs["position_ids"] = torch.cat((own, position_ids + virtual), dim=1)
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(base.config.get_text_config(), "use_cache", False)
    use_cache = use_cache and not _is_checkpointed(base)
    if cache is not None:
        kwargs |= {_name_of_cache(base.forward): cache, "use_cache": use_cache}
    with nullcontext() if cache is None else _checkpointing_with_cache(base):
        outputs = base(
            inputs_embeds=torch.cat((prompt, embeds), dim=1),
            attention_mask=mask,
            labels=labels,
            return_dict=inputs["return_dict"] if cache is None else True,
            **kwargs,
        )
    if cache is None:
        return outputs

    outputs.logits = torch.cat((shared_logits, outputs.logits), dim=1)
    if not use_cache:
        for name in ("past_key_values", "cache"):
            if name in outputs:
                outputs[name] = None
    return_dict = base.config.return_dict if inputs["return_dict"] is None else inputs["return_dict"]
    return outputs if return_dict else outputs.to_tuple()


def _shared(
    model: PeftModelForCausalLM,
    embeds: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    documents: Tensor | None,
    kwargs: dict,
) -> int:
    """How many leading virtual tokens run once for the batch: all but the last, or none.

    None of them does where outputs would show it, where dropout makes samples differ, and where it does not pay: a
    token less saves about 12 H² multiply-adds in each layer's projections; but where attention to a cache takes a
    mask, what it hides is computed too, length² H multiply-adds more per sample and layer.
    """
    base, virtual = model.base_model, model.active_peft_config.num_virtual_tokens
    samples, length, hidden = embeds.shape
    config = base.config.get_text_config()
    plain = {"full_attention", "sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ())
    if samples == 1 or virtual == 1 or not plain or not getattr(base, "_supports_attention_backend", False):
        return 0
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "output_router_logits", False):
        return 0
    if config.output_hidden_states or config.output_attentions or _has_dropout(base):
        return 0
    if any(
        value is not None for name, value in kwargs.items() if name not in ("use_cache", "num_items_in_batch")
    ):
        return 0
    masked = documents is not None or (attention_mask is not None and not _shows_all(attention_mask))
    pays = 12 * hidden * virtual * (samples - 1) > length**2 * samples
    return virtual - 1 if masked or pays or _may_be_causal(base, attention_mask) else 0


def _shows_all(attention_mask: Tensor | dict[str, Tensor]) -> bool:
    """Whether attention runs without a mask; under torch.compile, transformers asks no mask for its values either."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or torch.compiler.is_compiling():
        return False
    return bool(attention_mask.all())


def _run_shared(base: nn.Module, prompt: Tensor, samples: int) -> tuple[Cache | None, Tensor | None]:
    """Keys and values of a prompt [1, shared, H] and logits [samples, shared, vocabulary], views of one sample's."""
    if prompt.shape[1] == 0:
        return None, None
    cache = DynamicCache()
    with _without_checkpointing(base):
        with_cache = {_name_of_cache(base.forward): cache, "use_cache": True}
        outputs = base(inputs_embeds=prompt, return_dict=True, **with_cache)
    _expand(cache, samples)
    return cache, outputs.logits.expand(samples, -1, -1)


def _name_of_cache(function: Callable) -> str:
    """What it calls its argument: transformers has another name for it from 5.24 on."""
    return "cache" if "cache" in signature(function).parameters else "past_key_values"


def _expand(cache: Cache, samples: int) -> None:
    """Makes the cache of one sample one of many, without a copy."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(samples, -1, -1, -1)
            layer.values = layer.values.expand(samples, -1, -1, -1)


def _has_dropout(base: nn.Module) -> bool:
    return any(
        module.training
        and (
            (isinstance(module, nn.Dropout) and module.p > 0)
            or any("drop" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())
        )
        for module in base.modules()
    )


def _check_context(model: PeftModelForCausalLM, length: int, position_ids: Tensor | None) -> None:
    """Only where positions are looked up in a table: rotary ones go on past what the model was trained for."""
    virtual = model.active_peft_config.num_virtual_tokens
    limit = getattr(model.base_model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or virtual + length <= limit:
        return
    if position_ids is not None:
        length = int(position_ids.max()) + 1
    tables = (module for module in model.base_model.modules() if isinstance(module, nn.Embedding))
    if virtual + length > limit and any(
        table is not model.word_embeddings and limit <= table.num_embeddings <= limit + 2 for table in tables
    ):
        raise ValueError(
            f"num_virtual_tokens ({virtual}) and the input's {length} tokens are more than the {limit} positions "
            "of the model."
        )


# ---- masks ----------------------------------------------------------------------------------------------


def _documents(attention_mask, position_ids: Tensor | None, samples: int) -> Tensor | None:
    """Which document of its row each token belongs to, [samples, length]; None where no row has more than one."""
    if attention_mask is not None or position_ids is None:
        return None
    return find_packed_sequence_indices(position_ids.expand(samples, -1))


def _mask(
    model: PeftModelForCausalLM,
    attention_mask: Tensor | dict[str, Tensor] | None,
    documents: Tensor | None,
    cached: int,
    cache: Cache | None,
    dtype: torch.dtype,
    given: Tensor,
) -> Tensor | dict[str, Tensor] | None:
    """The attention mask of what follows the first `cached` of the virtual tokens.

    Args:
        given: [samples, length, ...], the tokens without the virtual ones.
    """
    virtual = model.active_peft_config.num_virtual_tokens
    config, device = model.base_model.config, given.device
    if documents is not None:
        return _packed_mask(config, documents.to(device), virtual, cached, cache, dtype)
    rows = virtual - cached + given.shape[1]
    # Of more cached tokens than others, zeros would be more to compute than what the mask hides.
    if 0 < cached < rows and _may_be_causal(model.base_model, attention_mask):
        own = create_masks_for_generate(
            config=config,
            inputs_embeds=torch.empty(1, rows, 0, dtype=dtype, device=device),
            attention_mask=None,
            **{_name_of_cache(create_masks_for_generate): cache},
        )
        causal = torch.ones(1, 1, rows, cached + rows, dtype=torch.bool, device=device).tril(cached)
        masks = own.values() if isinstance(own, dict) else [own]
        if all(isinstance(mask, Tensor) and torch.equal(mask, causal) for mask in masks):
            return causal.as_subclass(CausalMask)
    if isinstance(attention_mask, dict):
        return {name: _prepared_mask(mask, virtual, cached) for name, mask in attention_mask.items()}
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask if attention_mask is None else _prepared_mask(attention_mask, virtual, cached)
    return pad(attention_mask, (virtual, 0), value=1)


def _may_be_causal(base: nn.Module, attention_mask: Tensor | dict[str, Tensor] | None) -> bool:
    """Whether a `CausalMask` can tell what is visible, unless the model has masks of a kind of its own."""
    config = base.config
    return (
        config.get_text_config() is config
        and config._attn_implementation == "sdpa"
        and getattr(config, "sliding_window", None) is None
        and getattr(base, "_supports_attention_backend", False)
        and not torch.compiler.is_compiling()
        and (attention_mask is None or _shows_all(attention_mask))
    )


class CausalMask(Tensor):
    """The mask [1, 1, queries, keys] of the last tokens of a sequence, which hides the future alone: torch's attention
    runs without it. For everything else it is a mask like any other, and what is made of it is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        run = cls._attend if function is scaled_dot_product_attention else function
        with torch._C.DisableTorchFunctionSubclass():
            return run(*args, **(kwargs or {}))

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options) -> Tensor:
        queries, keys = query.shape[-2], key.shape[-2]
        if attn_mask.shape[-2:] != (queries, keys):
            return scaled_dot_product_attention(query, key, value, attn_mask, **options)
        query = pad(query, (0, 0, keys - queries, 0))
        output = scaled_dot_product_attention(query, key, value, **options | {"is_causal": True})
        return output[..., -queries:, :]


def _packed_mask(
    config, documents: Tensor, virtual: int, cached: int, cache: Cache | None, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """A token sees the virtual tokens and its own document, in a sliding window as if it followed them directly."""
    documents = pad(documents, (virtual, 0), value=-1)
    index = torch.arange(documents.shape[1], device=documents.device)
    first = pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    start = torch.where(first, index, 0).cummax(dim=1).values
    place = torch.where(
        documents < 0, index, index - start + virtual
    )  # in the sequence that its document would be
    window = getattr(config.get_text_config(), "sliding_window", None)

    def own_document(sample, head, query, key):
        return (documents[sample, key] < 0) | (documents[sample, query] == documents[sample, key])

    def virtual_in_reach(sample, head, query, key):
        return (documents[sample, key] < 0) & (key <= query) & (key > place[sample, query] - window)

    masks = create_masks_for_generate(
        config=config,
        inputs_embeds=torch.empty(
            len(documents), len(index) - cached, 0, dtype=dtype, device=documents.device
        ),
        attention_mask=None,
        **{_name_of_cache(create_masks_for_generate): cache},
        or_mask_function=virtual_in_reach if window else None,
        and_mask_function=own_document,
    )
    return next(iter(masks.values())) if isinstance(masks, dict) and len(masks) == 1 else masks


def _prepared_mask(mask: Tensor, virtual: int, cached: int) -> Tensor:
    """A mask [samples or 1, 1 or heads, length, length] with the virtual tokens before it, less the cached rows."""
    shows, hides = (True, False) if mask.dtype is torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = pad(mask, (virtual, 0, virtual - cached, 0), value=shows)
    rows, columns = virtual - cached, mask.shape[-1]
    index = torch.arange(columns, device=mask.device)
    hidden = index > index[cached:virtual, None]
    mask[..., :rows, :] = mask[..., :rows, :].masked_fill(hidden, hides)
    return mask


# ---- gradient checkpointing -----------------------------------------------------------------------------


def _checkpointed_layers(base: nn.Module) -> list[GradientCheckpointingLayer]:
    return [
        module
        for module in base.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and module.training
    ]


def _is_checkpointed(base: nn.Module) -> bool:
    return any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in base.modules()
    )


@contextmanager
def _without_checkpointing(base: nn.Module, but: tuple[type, ...] = ()) -> Iterator[None]:
    """With checkpointing switched off in all modules that are not of the types `but`."""
    modules = [
        module
        for module in base.modules()
        if getattr(module, "gradient_checkpointing", False) and not isinstance(module, but)
    ]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


@contextmanager
def _checkpointing_with_cache(base: nn.Module) -> Iterator[None]:
    """Checkpointed layers, if there are any, get the cache that the model is called with: transformers drops it.

    Raises:
        ValueError: at the end, if the model gave no layer a cache.
    """
    layers = _checkpointed_layers(base)
    if not layers:
        yield
        return
    checkpoints = [layer._gradient_checkpointing_func for layer in layers]
    reached: set[int] = set()
    for layer, checkpoint in zip(layers, checkpoints):
        indices = (getattr(module, "layer_idx", None) for module in layer.modules())
        index = next((index for index in indices if isinstance(index, int)), None)
        if index is not None:
            layer._can_checkpoint_with_cache = True
            layer._gradient_checkpointing_func = partial(_checkpoint, checkpoint, index, reached)
    try:
        # Some models drop the cache themselves where their own flag is set; the layers have flags of theirs.
        with _without_checkpointing(base, but=(GradientCheckpointingLayer,)):
            yield
    finally:
        for layer, checkpoint in zip(layers, checkpoints):
            vars(layer).pop("_can_checkpoint_with_cache", None)
            layer._gradient_checkpointing_func = checkpoint
    if not reached:
        raise ValueError(
            f"A {type(base).__name__} hands its checkpointed layers no cache to read a prefix from."
        )


def _checkpoint(checkpoint: Callable, index: int, reached: set[int], function: partial, *args):
    """Checkpoints a layer with its prefix among the arguments. Each run sees a cache that holds just this."""
    cache = next((value for value in (*args, *function.keywords.values()) if isinstance(value, Cache)), None)
    if cache is None or index >= len(cache.layers) or not cache.layers[index].is_initialized:
        return checkpoint(function, *args)
    reached.add(index)

    def run(*args):
        *args, keys, values = args
        fresh, layer = copy(cache), copy(cache.layers[index])
        fresh.layers = list(cache.layers)
        fresh.layers[index], layer.keys, layer.values = layer, keys, values

        def own(value):
            return fresh if value is cache else value

        keywords = {name: own(value) for name, value in function.keywords.items()}
        return function.func(*function.args, *map(own, args), **keywords)

    return checkpoint(run, *args, cache.layers[index].keys, cache.layers[index].values)


# ---- whether the fast path may run ----------------------------------------------------------------------
# Each function returns None or the reason why not, as the rest of "... cannot run on the fast path: ".


def why_not(model: PeftModel) -> str | None:
    return _at_rest(model) or _why_not_reached(model) or _why_not(model) or last_fallback(model)


def _at_rest(model: PeftModel) -> str | None:
    if not model._is_prompt_learning:
        return "its method is not one of prompts"
    return "its adapter is disabled, the base model runs alone" if model._adapters_disabled else None


def _why_not_reached(model: PeftModel) -> str | None:
    """`disable_adapter` leaves the forward that it found on the model."""
    own = vars(model).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(model).forward:
        return "its forward was replaced before peftfast was enabled"
    return None


def _why_not(model: PeftModel) -> str | None:
    """The model itself, whatever the input."""
    method = model.active_peft_config.peft_type
    if method not in PREFIXES + PROMPTS:
        return f"peftfast has no path of its own for {method.value}"
    causal = isinstance(model, PeftModelForCausalLM)
    if not causal and (method in PROMPTS or not isinstance(model, WITH_PREFIXES_ONLY)):
        return f"{method.value} runs on causal language models, this is a {type(model).__name__}"
    base = model.base_model
    if method in PREFIXES and _is_checkpointed(base):
        if base.config.is_encoder_decoder:
            return "the prefix of an encoder-decoder cannot be checkpointed"
        if not _checkpointed_layers(base):
            return f"a {type(base).__name__} checkpoints in a way of its own"
    return None


def _why_not_call(
    model: PeftModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | dict[str, Tensor] | None = None,
    inputs_embeds: Tensor | None = None,
    *args,
    position_ids: Tensor | None = None,
    past_key_values=None,
    output_router_logits: bool | None = None,
    **kwargs,
) -> str | None:
    """The model, then what is passed to its forward."""
    reason = _why_not(model)
    if reason is not None or not isinstance(model, PeftModelForCausalLM):
        return reason
    if input_ids is None and inputs_embeds is None:
        return "its forward was given neither input_ids nor inputs_embeds"
    given_cache = past_key_values if past_key_values is not None else kwargs.get("cache")
    if given_cache is not None and model.active_peft_config.peft_type in PROMPTS:
        return "its forward was given past_key_values"
    if position_ids is not None and position_ids.dim() != 2:
        return f"its position_ids have {position_ids.dim()} dimensions"
    if position_ids is not None and "position_ids" not in signature(model.base_model.forward).parameters:
        return f"a {type(model.base_model).__name__} takes no position_ids"
    samples = (input_ids if input_ids is not None else inputs_embeds).shape[0]
    prepared = isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() == 4)
    if not prepared and _documents(attention_mask, position_ids, samples) is None:
        return None
    base = model.base_model
    config = base.config.get_text_config()
    if config is not base.config:
        return "packed documents or prepared masks take a model of text alone"
    if config._attn_implementation not in ("eager", "sdpa"):
        kind = config._attn_implementation
        return f"packed documents or prepared masks take attention of kind eager or sdpa, not {kind}"
    if not getattr(base, "_supports_attention_backend", False):
        return f"packed documents or prepared masks take 4-dimensional masks, and a {type(base).__name__} has none"
    if not {"full_attention", "sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        kinds = ", ".join(sorted(set(config.layer_types)))
        return f"packed documents or prepared masks take full or sliding attention, not {kinds}"
    if getattr(config, "attention_chunk_size", None):
        return "packed documents or prepared masks take full or sliding attention, not one in chunks"
    if output_router_logits or getattr(config, "output_router_logits", False):
        return "the router's auxiliary loss has no meaning for packed documents"
    return None
