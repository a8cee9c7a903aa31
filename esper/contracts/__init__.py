"""Domain types, the error tree, and the one place where both meet the wire format."""
