"""Federated softmax regression on scikit-learn's handwritten digits."""
