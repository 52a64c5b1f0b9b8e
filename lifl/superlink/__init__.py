"""Flower's SuperLink, as lifl serves it and as it is met from the outside."""
