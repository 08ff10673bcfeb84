"""Kernels, their plans and launches; an op's page, one folder up, says which of them it takes."""
