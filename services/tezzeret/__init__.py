"""Tezzeret: compiles blueprints to validated, optimised, signed kernels.

Importing the package loads nothing heavy, since each compile worker sets its limits before it imports torch.
"""
