"""Rollouts: an asynchronous protocol, the engines behind it, and one queue over all of them."""
