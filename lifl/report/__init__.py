"""The record of a finished round: the report, the result, and pictures of the report."""
