"""Descriptions that touch no memory: which token goes to which expert."""
