"""The PyTorch backend: any device, any floating dtype."""
