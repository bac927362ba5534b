"""Models and tokenizers: names, loading, precision, the built-in tiny model."""
