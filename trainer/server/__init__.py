"""The preview server: an API process and an engine process that owns the model."""
