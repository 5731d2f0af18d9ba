"""Crash-safe batches: many rows, one ledger, a gallery and a manifest."""
