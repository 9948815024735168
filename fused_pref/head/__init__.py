"""From logits, or from hidden states and the head's weight, to token log-probs and gradients."""
