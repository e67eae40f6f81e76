"""A mixture of LoRAs."""
