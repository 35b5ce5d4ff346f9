"""Hugging Face models and tokenizers: one place where all stages find, load, check and save them."""
