"""Tolaria: the trainer, and the control service that shows runs and carries commands to them."""
