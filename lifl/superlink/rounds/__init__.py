"""Rounds that the server folds: replies on their way, where their parts belong, what goes back."""
