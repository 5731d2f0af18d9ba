"""Send bytes over the network: one request out, one response back."""
