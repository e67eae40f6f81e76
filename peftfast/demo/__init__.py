"""What `peftfast demo` trains on: two small base models and a task new to them, all made by the scripts here."""

from pathlib import Path

BASE = Path(__file__).parent / "base_model"
MOE_BASE = Path(__file__).parent / "moe_base_model"
TRAIN_DATA = Path(__file__).parent / "train.jsonl"
HELD_OUT_DATA = Path(__file__).parent / "held_out.jsonl"
