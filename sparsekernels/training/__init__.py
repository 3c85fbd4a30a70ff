"""How selected weights are trained and shipped: compact values, hooks, re-selection, deltas. No optimizer."""
