"""Weights from where they lie to where they are needed: layouts → plan → moves. Knows layouts only, no engine and no
learner."""
