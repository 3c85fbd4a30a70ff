"""Training and shipping of selected weights: compact values, hooks, re-selection, deltas. No optimizer."""
