"""Hugging Face models and tokenizers: found, loaded, checked and saved, in one place for all stages."""
