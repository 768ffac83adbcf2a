"""Risk before the write: from the key alone, from the solved delta, and rehearsed as a hook."""
