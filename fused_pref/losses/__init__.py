"""The objectives: functions of per-sequence log-probs, their slopes, and the states of BCO."""
