"""Many task ids, one scheduler."""
