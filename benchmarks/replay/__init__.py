"""The host path of a call for GPUs that need not be there: everything is done but what a GPU would do."""
