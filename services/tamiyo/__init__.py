"""Tamiyo: reads the state of runs and decides whether, where and what to grow or remove."""
