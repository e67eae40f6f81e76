"""Greedy answers to prompts, and, run as a file, the proof that plain PEFT gives the same ones.

    python answer.py MODEL ADAPTER PROMPTS.json ANSWERS.json

loads the adapter over the model and answers every prompt. It imports transformers and PEFT but never peftfast; a model
that is to be in 4 bits is the exception, whose frozen layers are peftfast's, and all else PEFT's own code.
"""

from __future__ import annotations

import json
import sys


def answer(model, tokenizer, prompts: list[str], *, max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """Return the model's greedy continuation of each prompt, up to its end-of-sequence token.

    Prompts are answered in batches of similar length, padded on the left.
    """
    import torch

    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [prompts[index] for index in batch], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    model.train(was_training)
    return answers


def main(model_name: str, adapter: str, prompts_file: str, answers_file: str) -> None:
    """Answer {"prompts", "max_new_tokens", "quantization"} of one file into another, with stock PEFT alone.

    "quantization" is null or the arguments of FourBitConfig.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    with open(prompts_file, encoding="utf-8") as file:
        task = json.load(file)
    config = None
    if task["quantization"] is not None:
        from peftfast import FourBitConfig

        config = FourBitConfig(**task["quantization"])
    base = AutoModelForCausalLM.from_pretrained(
        model_name, dtype=torch.float32, local_files_only=True, quantization_config=config
    )
    model = PeftModel.from_pretrained(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    answers = answer(model, tokenizer, task["prompts"], max_new_tokens=task["max_new_tokens"])
    if "peftfast" in sys.modules and any(layer.fast for layer in sys.modules["peftfast"].report(model)):
        raise RuntimeError("peftfast ran adapted layers, so this was not plain PEFT")
    with open(answers_file, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
