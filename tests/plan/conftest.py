collect_ignore = ["torch_worker.py"]  # a program of its own; it has no doctests, and needs torch
