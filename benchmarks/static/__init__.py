"""What compiled code and the plans predict, for GPUs that need not be there."""
