"""Checkpoints from one form or layout into another, by one process in bounded memory, without a model.

Both forms are files in which boxes of tensors lie; the links between their names come from the learner's own layouts.
"""
