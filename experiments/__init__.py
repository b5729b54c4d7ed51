"""Programs, each run as `python -m experiments.NAME`."""
