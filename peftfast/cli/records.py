"""Read training data and check it: files, folders and data sets of the hub, as records of three kinds.

    {"prompt": "...", "completion": "..."}                     loss on the completion alone
    {"messages": [{"role": "user", "content": "..."}, ...]}    chat template; loss on what the assistant says
    {"text": "..."}                                            loss on everything

The columns of other usual formats become these: a question and its answer on the next line are a pair, alpaca's
instruction, input and output a pair in the words of https://github.com/tatsu-lab/stanford_alpaca, and ShareGPT's
conversations messages. A .txt file is one long text.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.settings import DATA_TYPES, listed

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLIT = "train"  # where none is named
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
EXPECTED = listed(
    tuple("{" + ", ".join(f'"{column}"' for column in columns) + "}" for columns in DATA_TYPES.values())
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def read_records(source: Path, *, split: str | None = None, kind: str | None = None) -> list[dict]:
    """Return the checked records of a file, a folder, or a data set of the hub, `name` or `name:config`.

    Args:
        split: of a folder or a data set; None: train. Files of a folder belong to splits as `datasets` has it: by test,
            validation and such words in their names, else to train.
        kind: one of DATA_TYPES; None: the first of which the columns are there.
    Raises:
        UserError: the source is missing, empty or not UTF-8, has no such split, or a record is malformed (named by its
            line or its place).
    """
    if source.is_dir():
        return _read_folder(source, split or SPLIT, kind)
    if source.suffix in SUFFIXES or source.exists() or not HUB_NAME.fullmatch(str(source)):
        if not source.is_file():
            raise UserError(f"{source} does not exist or is not a file.")
        if split is not None:
            raise UserError(
                f"{source} is a file: a split, such as {split}, is of a folder or a data set of the hub."
            )
        return _read_file(source, kind)
    return _read_hub(source, split or SPLIT, kind)


def check_raw_text(path: Path, records: list[dict]) -> None:
    """Raise UserError unless the records are raw text, as --objective pretrain takes it."""
    if "text" not in records[0]:
        raise UserError(
            f'{path}: --objective pretrain takes .txt files and lines with "text", not {_quoted(records[0])}.'
        )


def _read_file(path: Path, kind: str | None) -> list[dict]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: data files end in {listed(SUFFIXES)}.")
    if path.suffix == ".parquet":
        with tempfile.TemporaryDirectory() as cache:  # a copy elsewhere would be of no further use
            rows = _rows(path, kind, "parquet", data_files=str(path), split=SPLIT, cache_dir=cache)
        return _checked(((f"{path}, row {number}", row) for number, row in enumerate(rows, 1)), path, kind)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {first_sentence(error)}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty.")
    if path.suffix == ".txt":
        if kind not in (None, "text"):
            raise UserError(f"{path} is text: it has no {kind} data, which --data-type asks for.")
        return [{"text": content}]
    if path.suffix == ".csv":
        return _checked(_csv_rows(path, content), path, kind)
    if path.suffix == ".json" and content.lstrip().startswith("["):
        rows = _parsed(str(path), content)
        return _checked(((f"{path}, record {number}", row) for number, row in enumerate(rows, 1)), path, kind)
    # Not splitlines(): JSON strings may hold line separators other than \n.
    lines = enumerate(content.split("\n"), 1)
    named = ((f"{path}, line {number}", line) for number, line in lines if line.strip())
    return _checked(((where, _parsed(where, line)) for where, line in named), path, kind)


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: the line has not as many fields as the first one has names.")
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.reader.line_num}: not valid CSV ({first_sentence(error)})."
        ) from None


def _read_folder(folder: Path, split: str, kind: str | None) -> list[dict]:
    _datasets(folder)
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_local_or_remote(get_data_patterns(str(folder)), base_path=str(folder))
    except EmptyDatasetError:
        found = {}
    splits = {}
    for name, paths in found.items():
        if files := [Path(path).resolve() for path in paths if Path(path).suffix in SUFFIXES]:
            splits[str(name)] = sorted(files)
    # `datasets` leaves out what has no such word in its name as soon as another file has one.
    shown = (
        path
        for path in folder.rglob("*")
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    left = {path.resolve() for path in shown if path.suffix in SUFFIXES and path.is_file()}
    if left := left.difference(*splits.values()):
        splits[SPLIT] = sorted({*splits.get(SPLIT, []), *left})
    if not splits:
        raise UserError(f"{folder} holds no data file, whose name would end in {listed(SUFFIXES)}.")
    if split not in splits:
        raise UserError(f"{folder} has no split {split}; it has {', '.join(splits)}.")
    records: list[dict] = []
    for path in splits[split]:
        of_file = _read_file(path, kind)
        if records and of_file[0].keys() != records[0].keys():
            raise UserError(
                f"{path} holds {_quoted(of_file[0])} and {splits[split][0]} {_quoted(records[0])}, "
                "but a folder's files are of one kind."
            )
        records += of_file
    return records


def _read_hub(source: Path, split: str, kind: str | None) -> list[dict]:
    name, _, config = str(source).partition(":")
    rows = _rows(source, kind, name, config or None, split=split)
    return _checked(((f"{source}, row {number}", row) for number, row in enumerate(rows, 1)), source, kind)


def _rows(source: Path, kind: str | None, *args, **kwargs) -> list[dict]:
    """Return the rows that `datasets.load_dataset` gives, reduced to the columns of their kind."""
    datasets = _datasets(source)
    try:
        table = datasets.load_dataset(*args, **kwargs)
        columns = _columns(_kind_of(str(source), table.column_names, kind))
        rows = table.select_columns([name for name in columns if name in table.column_names]).to_list()
    except UserError:
        raise
    except Exception as error:  # whatever a library raises over a file or a name, these are at fault
        what = (
            "cannot be read"
            if source.is_file()
            else "is no file or folder, and no data set that can be loaded"
        )
        raise UserError(f"{source} {what}: {first_sentence(error)}.") from error
    if not rows:
        raise UserError(f"{source} is empty.")
    return rows


def _datasets(source: Path):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading it takes the library datasets: pip install datasets.") from None
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


# ---- records ------------------------------------------------------------------------------------------------


def _parsed(where: str, text: str):
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({first_sentence(error)}).") from None
    if "\\ud" in text.lower() and _lone_surrogate(value):
        raise UserError(f"{where}: a \\ud escape is without its other half, so the line is not valid text.")
    return value


def _lone_surrogate(record: object) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _checked(rows: Iterator[tuple[str, object]], source: Path, kind: str | None) -> list[dict]:
    """Return the records of rows, each with where it is, if they are well-formed and all of one kind."""
    records: list[dict] = []
    for where, row in rows:
        records.append(_record(where, row, kind))
        if records[-1].keys() != records[0].keys():
            raise UserError(
                f"{where}: the keys are {_quoted(records[-1])} and those of the first line "
                f"{_quoted(records[0])}, but a file holds lines of one kind."
            )
    if not records:
        raise UserError(f"{source} is empty.")
    return records


def _record(where: str, row: object, kind: str | None) -> dict:
    """Return a row as {"prompt", "completion"}, {"messages"} or {"text"}."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a line is a JSON object, not {type(row).__name__}.")
    kind = _kind_of(where, row, kind)
    row = {column: row[column] for column in _columns(kind) if row.get(column) is not None}
    for column in DATA_TYPES[kind]:
        if column not in row:
            raise UserError(f'{where}: "{column}" has no value.')
    if kind in ("messages", "sharegpt"):
        return {"messages": _messages(where, *row.items())}
    for column, value in row.items():
        if not isinstance(value, str):
            raise UserError(f'{where}: "{column}" is a string, not {type(value).__name__}.')
        if not value and column != "input":
            raise UserError(f'{where}: "{column}" is empty.')
    return PAIRS.get(kind, dict)(row)


def _alpaca(row: dict) -> dict:
    words = ALPACA_WITH_INPUT if row.get("input") else ALPACA
    return {"prompt": words.format(**row), "completion": row["output"]}


def _question(row: dict) -> dict:
    return {"prompt": row["question"] + "\n", "completion": row["answer"]}


PAIRS: dict[str, Callable[[dict], dict]] = {"alpaca": _alpaca, "question": _question}


def _kind_of(where: str, columns, kind: str | None) -> str:
    kinds = DATA_TYPES if kind is None else (kind,)
    for name in kinds:
        if all(column in columns for column in DATA_TYPES[name]):
            return name
    wanted = f"one of {EXPECTED}" if kind is None else _quoted(DATA_TYPES[kind])
    raise UserError(f"{where}: the keys are {_quoted(columns) or 'none'}; wanted is {wanted}.")


def _columns(kind: str) -> tuple[str, ...]:
    return (*DATA_TYPES[kind], *(("input",) if kind == "alpaca" else ()))


def _messages(where: str, column: tuple[str, object]) -> list[dict]:
    """Return a conversation, {"role", "content"} or ShareGPT's {"from", "value"}, in which an assistant speaks."""
    name, given = column
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise UserError(f'{where}: "{name}" is a list of objects.')
    messages = []
    for message in given:
        # A table has all columns in all its rows.
        message = {key: value for key, value in message.items() if value is not None}
        if name == "conversations" and "from" in message:
            message = {"role": message["from"], "content": message.get("value")}
            message["role"] = ROLES.get(message["role"], message["role"])
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            keys = 'a "role" and a "content"' if name == "messages" else 'a "from" and a "value"'
            raise UserError(f"{where}: every message has {keys}, both strings.")
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f'{where}: no message has the role "assistant", so there is nothing to learn.')
    return messages


def _quoted(columns) -> str:
    return ", ".join(f'"{column}"' for column in columns)
