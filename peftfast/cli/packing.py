"""Sample packing: rows of several examples, none of which sees another."""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections.abc import Callable

from peftfast.cli import data
from peftfast.cli.errors import UserError
from peftfast.cli.settings import TrainSettings

PROBED_TOKENS = 8  # of each of the examples on which the model is tried
TOLERANCE = 0.2  # what rounding may do to them, of what seeing each other does


def rows_of(examples: list[data.Example], capacity: int) -> list[list[data.Example]]:
    """Return the examples joined to rows of at most `capacity` tokens: best-fit decreasing.

    The longest first, each goes to the row with the least room that it fits in, the earliest of several such.

    Args:
        examples: of at most `capacity` tokens each.
    """
    rows: list[list[data.Example]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        found = bisect_left(open_rows, (length, 0))
        if found < len(open_rows):
            room, row = open_rows.pop(found)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        if room > length:
            insort(open_rows, (room - length, row))
    return rows


def join(row: list[data.Example]) -> dict[str, list[int]]:
    """Return a row of examples as model inputs: positions begin anew with each, and its first token is no label.

    Where positions begin anew and no attention mask is given, transformers' attention sees each example alone.
    """
    return {
        "input_ids": [token for example in row for token in example.input_ids],
        "labels": [label for example in row for label in (data.IGNORED, *example.labels[1:])],
        "position_ids": [position for example in row for position in range(len(example.input_ids))],
    }


class Stack:
    """The collator of rows that `join` made.

    A batch comes with an attention_mask, by which transformers' Trainer counts tokens; see `model_inputs`.

    Args:
        padding: the token that fills the shorter rows. Each is at position 0, and so an example by itself.
        flat: one row is made of the batch instead, which takes no padding but more time: attention computes what is
            hidden too. Of a mixture of experts, padding would count as tokens to be balanced among them.
    """

    def __init__(self, padding: int, *, flat: bool) -> None:
        self.padding, self.flat = padding, flat

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict:
        import torch

        if self.flat:
            rows = [{name: [value for row in rows for value in row[name]] for name in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        if not self.flat:
            longest += -longest % 8
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        filling = {"input_ids": self.padding, "labels": data.IGNORED}
        return {
            name: torch.tensor(
                [row[name] + [filling.get(name, 0)] * (longest - len(row[name])) for row in rows]
            )
            for name in rows[0]
        }


def model_inputs(batch: dict) -> dict:
    """Return a batch as the model takes it: with a mask, it would not look for examples within rows."""
    hidden = "attention_mask" if "position_ids" in batch else None
    return {name: values for name, values in batch.items() if name != hidden}


def check(model, settings: TrainSettings, stack: Callable, device) -> None:
    """Refuse a model that computes joined examples otherwise than each alone.

    It is tried: two examples, joined in either order and by themselves. The difference may be a small part of what the
    examples make to each other as one text, so that rounding in any dtype passes.

    Raises:
        UserError: they see each other, or their positions do not begin anew.
    """
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    config = model.config.get_text_config()
    first, second = torch.randint(config.vocab_size, (2, PROBED_TOKENS), generator=generator).tolist()
    examples = [data.Example(ids, ids) for ids in (first, second)]
    batch = model_inputs(stack([join(examples), join(examples[::-1])]))
    rows = {name: values.to(device) for name, values in batch.items() if name != "labels"}
    joined = torch.tensor([first + second, second + first], device=device)
    alone = torch.tensor([second, first], device=device)

    def logits(**inputs):
        length = inputs["input_ids"].shape[1]
        found = model(**inputs, use_cache=False).logits[:, -length:]  # after virtual tokens
        return found.reshape(-1, PROBED_TOKENS, found.shape[-1]).float()

    was_training = model.training
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT, that prompts lose position_ids: that is found out here
        expected, crossing = logits(input_ids=alone), logits(input_ids=joined)[1::2]
        try:
            packed = logits(**rows)[1::2]
        except TypeError:  # a model without position_ids
            packed = crossing
    model.train(was_training)
    if not (packed - expected).norm() <= TOLERANCE * (crossing - expected).norm():  # nor NaN
        raise UserError(
            f"--sample-packing: with --method {settings.method}, --backend {settings.backend} and "
            f"{config._attn_implementation} attention, a {config.model_type} lets examples of a row see each other."
        )
