"""What only CPUs need: threads that work on pieces, large buffers, products with fewer multiplications."""
