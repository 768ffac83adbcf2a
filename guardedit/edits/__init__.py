"""What editors, risk and drift share: contexts, keys, values, the closed-form solver, deltas."""
