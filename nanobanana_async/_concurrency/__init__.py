"""Concurrency primitives that know nothing of the domain but its errors."""
