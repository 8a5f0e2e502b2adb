"""Weights of others' code as parameters of the networks here."""
