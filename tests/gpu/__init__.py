"""What wants a GPU. Nothing of it runs in `make test` but at a small size on a CPU."""
