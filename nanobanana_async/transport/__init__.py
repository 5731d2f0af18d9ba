"""What travels: one request out, one reply back, and what the outcome means."""
