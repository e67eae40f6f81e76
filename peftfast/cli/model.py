"""Load a model and its tokenizer, or say in one sentence why not."""

import ctypes
import os
import re
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence


def is_local_model(name: str, told_by: str = "--model") -> bool:
    """Tell a folder from a hub name, which is the one thing that lets transformers use the network.

    Args:
        told_by: the option that names the model, for the error; "" for an argument.
    Raises:
        UserError: `name` looks like a path and is not the folder of a model.
    """
    path = Path(name).expanduser()
    starts_in_folder = len(path.parts) > 1 and Path(path.parts[0]).exists()
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not starts_in_folder and not path.exists():
        return False
    named = f"{told_by} {name}".lstrip()
    if not path.is_dir():
        raise UserError(f"{named}: there is no such folder.")
    if not (path / "config.json").is_file():
        raise UserError(f"{named}: not a model folder, it has no config.json.")
    return True


def return_freed_memory() -> None:
    """Have glibc give blocks of a mebibyte and more back to the system as soon as they are freed.

    Of itself it keeps blocks of up to 32 MiB for later. In the first step of training, what stays (gradients, the
    optimizer's state) then comes to lie among what goes (activations), and the holes between do not fit the next ones.
    MALLOC_MMAP_THRESHOLD_ in the environment, which says the same, stays in force. Under another C library, nothing.
    """
    mallopt, mmap_threshold = getattr(ctypes.CDLL(None), "mallopt", None), -3  # of malloc.h
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(mmap_threshold, 2**20)


def load_config(name: str, told_by: str = "--model"):
    """Return the configuration of a hub model, of a local folder, or in a file of its own.

    Args:
        told_by: as for is_local_model.
    Raises:
        UserError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    path, named = Path(name).expanduser(), f"{told_by} {name}".lstrip()
    local = path.is_file() or is_local_model(name, told_by)
    try:
        return AutoConfig.from_pretrained(path if local else name, local_files_only=local)
    except Exception as error:  # whatever a library raises over it
        raise UserError(f"{named}: its config.json cannot be read: {first_sentence(error)}.") from error


def load_tokenizer(name: str, local: bool):
    """Return the model's tokenizer, with a padding token; `local` keeps off the network.

    Raises:
        UserError: it cannot be loaded, or has no token to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            Path(name).expanduser() if local else name, local_files_only=local
        )
    except Exception as error:  # whatever a library raises over a folder's contents, the folder is at fault
        raise UserError(
            f"--model {name}: its tokenizer cannot be loaded: {first_sentence(error)}."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"--model {name}: its tokenizer has neither a padding nor an end-of-sequence token.")
    return tokenizer


def load_model(name: str, dtype: str, local: bool, four_bit_config=None, attention: str | None = None):
    """Return the causal language model with weights of torch's `dtype`; `local` keeps off the network.

    `four_bit_config`, a FourBitConfig, keeps its linear layers in 4 bits; None: the model is dense. `attention` is
    transformers' attn_implementation; None: as it chooses.

    Raises:
        UserError: it cannot be loaded, is no causal language model, or lacks some of its weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(name).expanduser() if local else name
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local)
        held = getattr(config, "quantization_config", {})
        if four_bit_config is None and (
            held.get("load_in_4bit") or held.get("quant_method") == "peftfast_4bit"
        ):
            raise ValueError("its weights are in 4 bits, which takes --method qlora")
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=four_bit_config,
            attn_implementation=attention,
        )
    except Exception as error:  # as above
        how = f" with --attn-implementation {attention}" if attention else ""
        raise UserError(
            f"--model {name}: the model cannot be loaded{how}: {first_sentence(error)}."
        ) from error
    if info["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise UserError(
            f"--model {name}: the checkpoint lacks {len(info['missing_keys'])} of the model's weights."
        )
    if four_bit_config is not None and not held:
        # The file is mapped. As long as one tensor lies in it, all that was read of it is the process's memory.
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.clone()
    return model
