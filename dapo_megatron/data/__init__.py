"""Prompts, tokenizers, the records that travel, and packing by token budget."""
