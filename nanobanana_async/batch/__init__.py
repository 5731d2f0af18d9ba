"""Many rows, and what people see of them."""
