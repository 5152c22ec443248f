"""Each model's LoRA as a PEFT adapter of a base that is known."""
