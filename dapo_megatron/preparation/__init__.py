"""Prompt files made ready for training: selected, answers as integers, rewritten by a language model where needed."""
