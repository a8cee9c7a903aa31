"""The training side: wrapping, growing, and what a run says of itself."""
