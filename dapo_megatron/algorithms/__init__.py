"""Advantages, policy losses and token selection: functions on arrays; no process groups, no megatron."""
