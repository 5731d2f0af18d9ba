"""The operations of the service: who may send, when, and what a response means for the next attempt."""
