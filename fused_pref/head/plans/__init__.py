"""The plans of the linear head, one a module: its cost, its forward, its backward and what is said of it."""
