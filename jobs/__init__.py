"""What runs: one module per batch job; argv and environment in, exit code out. Nothing imports jobs."""
