"""A run over checkpoints: recover, inspect and compare, tensor by tensor, and the report."""
