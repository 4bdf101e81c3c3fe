"""The Megatron-core learner: log-probabilities and updates over tensor-, pipeline- and data-parallel ranks."""
