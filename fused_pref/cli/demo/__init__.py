"""The demo: a small language model with a large vocabulary learns to prefer good translations (extra ``demo``)."""
