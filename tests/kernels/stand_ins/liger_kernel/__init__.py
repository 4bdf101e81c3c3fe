"""Stands in for Liger-Kernel 0.8 where it is not installed: its names, arguments and meaning, in plain torch."""
