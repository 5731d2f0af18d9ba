"""The durable record of every attempt."""
