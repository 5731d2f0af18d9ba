"""Measurement scripts. Run each as `python -m benchmarks.NAME`."""
