"""Concurrency primitives, independent of the domain except for its errors."""
