"""Everything that a machine can tell about this library within minutes."""
