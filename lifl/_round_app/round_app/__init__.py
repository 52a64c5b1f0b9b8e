"""Rounds to be measured."""
