"""Rounds that the server folds: their messages, the replies that arrive, the places of their parts, the new model."""
