"""The Flower app whose rounds `lifl bench round` measures."""
