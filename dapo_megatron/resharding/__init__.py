"""Weights from where they lie to where they are needed: layouts → plan → moves. Knows no engine and no learner."""
