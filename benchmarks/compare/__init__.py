"""The linear head beside its peers."""
