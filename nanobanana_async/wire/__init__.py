"""Bytes to models and back. Pure: no sockets, no clock."""
