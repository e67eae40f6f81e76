"""LoRA on chosen experts."""
