"""The six services; they meet over gRPC and NATS only."""
