"""Pretrain the demo's base models over bytes: a 0.9-million-parameter Llama, and a Qwen3 mixture of experts.

    python -m peftfast.demo.pretrain --model dense --out peftfast/demo/base_model
    python -m peftfast.demo.pretrain --model moe --out peftfast/demo/moe_base_model

The mixture has 8 experts to a layer, 2 of them for each byte: 1.5 million parameters, of which a byte meets 0.6
million. The text is the standard library of the running Python, code and docstrings alike, read once in a seeded
order. Nothing is downloaded. On one core each takes about half an hour; the same Python, torch and number of
threads give the same model.
"""

from __future__ import annotations

import argparse
import copy
import random
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END_OF_TEXT, PADDING = "<|end|>", "<|pad|>"
SEQUENCE_LENGTH = 256
# One block in so many holds its own beginning over and over. From plain text alone, a small model does not
# learn to look back and copy in so few steps, and every task on its input asks for that.
REPEATED = 4
MODELS = ("dense", "moe")
# Tests repeat themselves, encodings are tables, and what pip installed differs between machines.
SKIPPED_FOLDERS = {"test", "tests", "encodings", "site-packages", "dist-packages"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with one token per byte of UTF-8, plus end of text and padding: 258 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, END_OF_TEXT, PADDING])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=2 * SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, kind: str = "dense") -> PreTrainedModel:
    """Return an untrained base model, one of MODELS, float32."""
    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=2 * SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=384, **common))
    config = Qwen3MoeConfig(
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        **common,
    )
    return Qwen3MoeForCausalLM(config)


def read_standard_library() -> list[str]:
    """Return the text of every module of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [
        (root / module).read_text(encoding="utf-8", errors="replace")
        for module in modules
        if not SKIPPED_FOLDERS.intersection(module.parts)
    ]


def encode_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """Return the texts as shuffled blocks of token ids, int64 [blocks, SEQUENCE_LENGTH]."""
    order = random.Random(seed)
    texts = order.sample(texts, len(texts))
    stream = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        stream += [*encoding.ids, tokenizer.eos_token_id]
    usable = len(stream) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    blocks = torch.tensor(stream[:usable]).view(-1, SEQUENCE_LENGTH)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
    for block in blocks[::REPEATED]:
        period = order.randint(16, SEQUENCE_LENGTH // 2)
        block.copy_(block[:period].repeat(SEQUENCE_LENGTH // period + 1)[:SEQUENCE_LENGTH])
    return blocks


def pretrain(
    out: Path,
    *,
    kind: str = "dense",
    seed: int = 0,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    max_steps: int | None = None,
) -> None:
    """Train a base model, one of MODELS, for one pass over the standard library; save it, with its tokenizer, to `out`.

    The weights are stored as bfloat16, which halves the file. `max_steps` ends the pass early. The mixture's loss
    holds the router's load-balancing loss too (Fedus et al. 2021, Switch Transformers).
    """
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, kind)
    balanced = {} if kind == "dense" else {"output_router_logits": True}
    blocks = encode_blocks(read_standard_library(), tokenizer, seed)
    held_out, blocks = blocks[:64], blocks[64:]
    steps = min(len(blocks) // batch_size, max_steps or len(blocks))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    # Warm up, hold, then fall to zero over the last third.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, (steps - step) / (steps / 3))
    )
    print(f"{model.num_parameters():,} parameters, {blocks.numel():,} tokens, {steps} steps", flush=True)
    started = time.perf_counter()
    for step in range(steps):
        batch = blocks[step * batch_size : (step + 1) * batch_size]
        loss = model(input_ids=batch, labels=batch, use_cache=False, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            with torch.no_grad():
                evaluation = model(input_ids=held_out, labels=held_out, use_cache=False).loss.item()
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1}  held-out loss {evaluation:.3f} nats per byte  {seconds:.0f} s", flush=True
            )
            save(model, tokenizer, out)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model (bfloat16 safetensors) and its tokenizer to the folder `out`."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Read the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder that receives model and tokenizer"
    )
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=None, help="end the pass after so many steps")
    arguments = parser.parse_args()
    pretrain(arguments.out, kind=arguments.model, seed=arguments.seed, max_steps=arguments.max_steps)


if __name__ == "__main__":
    main()
