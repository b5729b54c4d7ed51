"""Runs a plan: the instructions of every device, and the programs that they call."""
