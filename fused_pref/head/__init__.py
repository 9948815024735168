"""From logits or hidden states to token log-probs and gradients."""
