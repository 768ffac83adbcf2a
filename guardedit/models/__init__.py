"""Load a causal language model, watch it, replace an activation, measure its second moments."""
