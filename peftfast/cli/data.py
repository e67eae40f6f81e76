"""Read and check training data, and turn it into token ids.

Three kinds of JSONL line are known, one kind to a file, and plain text:

    {"prompt": "...", "completion": "..."}                     loss on the completion alone
    {"messages": [{"role": "user", "content": "..."}, ...]}    chat template; loss on what the assistant says
    {"text": "..."}                                            loss on everything
    any .txt file                                              as one long text
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence

IGNORED = -100  # the label that cross entropy in torch and transformers leaves out
KINDS = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
EXPECTED = 'one of {"prompt", "completion"}, {"messages"} or {"text"}'


@dataclass(frozen=True)
class Example:
    """One training sequence. `labels` is as long as `input_ids` and IGNORED where no loss is taken.

    `prompt` and `completion` are set for prompt/completion data only, which can be scored by exact match.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str | None = None
    completion: str | None = None


def read_records(path: Path) -> list[dict]:
    """Return the checked lines of a .jsonl file, or a .txt file as one {"text"} record.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line is malformed (named by its number).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: data files end in .jsonl or .txt.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {first_sentence(error)}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty.")
    if path.suffix == ".txt":
        return [{"text": content}]
    # Not splitlines(): JSON strings may hold line separators other than \n.
    records: list[dict] = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            records.append(_read_line(path, number, line))
            if records[-1].keys() != records[0].keys():
                raise UserError(
                    f"{path}, line {number}: the keys are {_quoted(records[-1])} and those of the first line "
                    f"{_quoted(records[0])}, but a file holds lines of one kind."
                )
    return records


def _read_line(path: Path, number: int, line: str) -> dict:
    """Return one line's record, reduced to the keys of its kind."""
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({first_sentence(error)}).") from None
    if "\\ud" in line.lower() and _lone_surrogate(record):
        raise UserError(f"{where}: a \\ud escape is without its other half, so the line is not valid text.")
    if not isinstance(record, dict):
        raise UserError(f"{where}: a line is a JSON object, not {type(record).__name__}.")
    for keys in KINDS.values():
        if all(key in record for key in keys):
            break
    else:
        raise UserError(f"{where}: the keys are {_quoted(record) or 'none'}; wanted is {EXPECTED}.")
    record = {key: record[key] for key in keys}
    if "messages" in record:
        _check_messages(where, record["messages"])
        return record
    for key, value in record.items():
        if not isinstance(value, str):
            raise UserError(f'{where}: "{key}" is a string, not {type(value).__name__}.')
        if not value:
            raise UserError(f'{where}: "{key}" is empty.')
    return record


def _lone_surrogate(record: object) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _check_messages(where: str, messages: object) -> None:
    """Refuse a conversation that is not a list of role and content, or in which no assistant speaks."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f'{where}: "messages" is a list of objects.')
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f'{where}: every message has a "role" and a "content", both strings.')
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f'{where}: no message has the role "assistant", so there is nothing to learn.')


def _quoted(record: dict) -> str:
    return ", ".join(f'"{key}"' for key in record)


def encode(records: list[dict], tokenizer, sequence_len: int) -> list[Example]:
    """Return the records as examples of at most `sequence_len` tokens.

    Text is cut into blocks. A prompt/completion pair or a conversation that is longer loses its end, and is
    left out if that is all there was to learn.

    Raises:
        UserError: nothing is left, or a conversation meets a tokenizer without a chat template.
    """
    if "messages" in records[0] and not getattr(tokenizer, "chat_template", None):
        raise UserError('the model\'s tokenizer has no chat template, which {"messages"} data needs.')
    examples = []
    for record in records:
        if "text" in record:
            examples += _blocks(_closed_ids(record["text"], tokenizer), sequence_len)
        elif "messages" in record:
            examples.append(
                _encode_parts(_chat_parts(record["messages"], tokenizer), tokenizer, sequence_len)
            )
        else:
            # The beginning-of-sequence token, where a model has one, is the prompt's.
            prompt = tokenizer(record["prompt"], verbose=False)["input_ids"]
            parts = [(prompt, False), (record["completion"], True), (_end(tokenizer), True)]
            examples.append(_encode_parts(parts, tokenizer, sequence_len, **record))
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


def check_raw_text(path: Path, records: list[dict]) -> None:
    """Raise UserError unless the records are raw text, as --objective pretrain takes it."""
    if "text" not in records[0]:
        raise UserError(
            f'{path}: --objective pretrain takes .txt files and lines with "text", not {_quoted(records[0])}.'
        )


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


def _chat_parts(messages: list[dict], tokenizer) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into what the assistant says, which is learned, and the rest."""

    def render(count: int, generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=generation_prompt
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
