"""Nissa: aggregates what every component says, finds anomalies, tells health, writes reports."""
