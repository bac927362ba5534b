"""The built-in demo: generated symbolic tasks, and how the tiny model's tokenizer was made."""
