"""What `peftfast demo` trains on: a small base model and a task new to it, both made by the scripts here."""

from pathlib import Path

BASE = Path(__file__).parent / "base_model"
TRAIN_DATA = Path(__file__).parent / "train.jsonl"
HELD_OUT_DATA = Path(__file__).parent / "held_out.jsonl"
