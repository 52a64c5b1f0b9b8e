"""The record of a finished round: numbers, result, and pictures of both."""
