"""Which experts a model uses."""
