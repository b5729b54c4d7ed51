"""The step of one candidate plan, in arrays and compiled."""
