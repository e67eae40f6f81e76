"""Turn records of training data into token ids."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence

IGNORED = -100  # the label that cross entropy in torch and transformers leaves out
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # where a chat template marks what the assistant says
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}


@dataclass(frozen=True)
class Example:
    """One training sequence. `labels` is as long as `input_ids` and IGNORED where no loss is taken.

    `prompt` and `completion` are set for prompt/completion data only, which can be scored by exact match.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str | None = None
    completion: str | None = None


def use_chat_template(tokenizer, template: str) -> None:
    """Give the tokenizer a chat template: the Jinja text in a file, or one of CHAT_TEMPLATES.

    Raises:
        UserError: there is no such file, or it holds no template.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    if template in CHAT_TEMPLATES:
        tokenizer.chat_template = CHAT_TEMPLATES[template]
        return
    path = Path(template).expanduser()
    if not path.is_file():
        raise UserError(
            f"--chat-template {template} is neither a file nor one of {', '.join(CHAT_TEMPLATES)}."
        )
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {template} is not a Jinja template: {first_sentence(error)}."
        ) from None
    except TemplateError:
        return  # it may want other conversations than this


def encode(
    records: list[dict], tokenizer, sequence_len: int, *, train_on_inputs: bool = False
) -> list[Example]:
    """Return the records as examples of at most `sequence_len` tokens.

    Text is cut into blocks. A prompt/completion pair or a conversation that is longer loses its end, and is
    left out if that is all there was to learn. `train_on_inputs`: every token is learned, not the completion or what
    the assistant says alone.

    Raises:
        UserError: nothing is left, or a conversation meets a tokenizer without a chat template.
    """
    if "messages" in records[0] and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            'the model\'s tokenizer has no chat template, which {"messages"} data needs: pass --chat-template.'
        )
    examples = []
    for record in records:
        if "text" in record:
            examples += _blocks(_closed_ids(record["text"], tokenizer), sequence_len)
        elif "messages" in record:
            examples.append(_encode_chat(record["messages"], tokenizer, sequence_len))
        else:
            # The beginning-of-sequence token, where a model has one, is the prompt's.
            prompt = tokenizer(record["prompt"], verbose=False)["input_ids"]
            parts = [(prompt, False), (record["completion"], True), (_end(tokenizer), True)]
            examples.append(_encode_parts(parts, tokenizer, sequence_len, **record))
    if train_on_inputs:
        examples = [replace(example, labels=list(example.input_ids)) for example in examples]
    examples = [example for example in examples if any(label != IGNORED for label in example.labels[1:])]
    if not examples:
        raise UserError(
            f"no example is left: at --sequence-len {sequence_len} none holds a token to learn from."
        )
    return examples


def pack(records: list[dict], tokenizer, sequence_len: int) -> list[Example]:
    """Return {"text"} records, joined, as full blocks of `sequence_len` tokens; the last may be shorter.

    The end-of-sequence token closes each text. As usual in pre-training, a block may hold several.

    Raises:
        UserError: of all texts no token is left to learn.
    """
    ids = [token for record in records for token in _closed_ids(record["text"], tokenizer)]
    blocks = [block for block in _blocks(ids, sequence_len) if len(block.input_ids) > 1]
    if records and not blocks:
        raise UserError("the text is one token long: there is nothing to learn.")
    return blocks


def _end(tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _closed_ids(text: str, tokenizer) -> list[int]:
    """Return a text's tokens and the end-of-sequence token."""
    return tokenizer(text, verbose=False)["input_ids"] + _end(tokenizer)


def _blocks(ids: list[int], sequence_len: int) -> list[Example]:
    blocks = [ids[start : start + sequence_len] for start in range(0, len(ids), sequence_len)]
    return [Example(block, list(block)) for block in blocks]


def _encode_parts(parts, tokenizer, sequence_len: int, **texts: str) -> Example:
    """Join parts, each (a string or token ids, whether it is learned), into one example."""
    input_ids: list[int] = []
    labels: list[int] = []
    for content, learned in parts:
        if isinstance(content, str):
            content = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        input_ids += content
        labels += content if learned else [IGNORED] * len(content)
    return Example(input_ids[:sequence_len], labels[:sequence_len], **texts)


def _encode_chat(messages: list[dict], tokenizer, sequence_len: int) -> Example:
    if tokenizer.is_fast and GENERATION.search(tokenizer.get_chat_template()):
        encoded = _apply_chat_template(
            tokenizer,
            messages,
            tokenizer_kwargs={"verbose": False},
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = list(encoded["input_ids"])
        labels = [
            token if learned else IGNORED
            for token, learned in zip(ids, encoded["assistant_masks"], strict=True)
        ]
        return Example(ids[:sequence_len], labels[:sequence_len])
    return _encode_parts(_chat_parts(messages, tokenizer), tokenizer, sequence_len)


def _chat_parts(messages: list[dict], tokenizer) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into what the assistant says, which is learned, and the rest."""

    def render(count: int, generation_prompt: bool) -> str:
        return _apply_chat_template(
            tokenizer, messages[:count], tokenize=False, add_generation_prompt=generation_prompt
        )

    whole = render(len(messages), False)
    parts, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not whole.startswith(before) or not whole.startswith(after):
            raise UserError("the chat template rewrites earlier turns, so the assistant's part is not known.")
        parts += [(whole[position : len(before)], False), (after[len(before) :], True)]
        position = len(after)
    return [*parts, (whole[position:], False)]


def _apply_chat_template(tokenizer, messages: list[dict], **options):
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # whatever a template raises over a conversation, the two do not go together
        raise UserError(f"the chat template fails on a conversation: {first_sentence(error)}.") from error


def split(examples: list, share: float, seed: int, *, at_most: int) -> tuple[list, list]:
    """Return (training, held-out) examples or records, drawn at random.

    A `share` above 0 holds out at least one example and at most `at_most`; 0 holds out none.
    """
    if share == 0:
        return examples, []
    if len(examples) < 2:
        raise UserError("one example cannot be split: pass --eval-file, or --eval-share 0 to train without.")
    count = min(max(1, round(share * len(examples))), len(examples) - 1, at_most)
    held_out = set(random.Random(seed).sample(range(len(examples)), count))
    return (
        [example for index, example in enumerate(examples) if index not in held_out],
        [example for index, example in enumerate(examples) if index in held_out],
    )
