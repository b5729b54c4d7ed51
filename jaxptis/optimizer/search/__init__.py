"""The search over all plans, and over the orders of one."""
